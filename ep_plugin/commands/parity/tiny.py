"""`--tiny`: the same kind of model and data, at a size that any machine can run."""

from collections.abc import Sequence
from math import lcm

from ep_plugin.checkpoint.moe_layers import moe_layers, parse_layers
from ep_plugin.commands.parity.comparable import Arguments, value, without
from ep_plugin.commands.parity.layouts import Layout
from ep_plugin.errors import ConfigError

HEAD = 16  # size of one attention head
SEQUENCE = 32
VOCABULARY = 512
DATA_FLAGS = (
    *("--data-path", "--train-data-path", "--valid-data-path", "--test-data-path", "--split"),
    *("--data-args-path", "--per-split-data-args-path", "--data-cache-path", "--mock-data"),
    *("--tokenizer-type", "--tokenizer-model", "--vocab-file", "--merge-file", "--vocab-size"),
    *("--tiktoken-pattern", "--tiktoken-num-special-tokens", "--tokenizer-hf-use-fast"),
)


def shrink(arguments: list[str], layouts: Sequence[Layout]) -> Arguments:
    """Return the flags of a small model whose every size divides at every layout.

    Depth, widths, heads, experts, sequence, vocabulary and batch are made small; which kind of
    block, attention, activation and routing stays. Data are random (`--mock-data`). Raises
    ConfigError for flags that name the sizes of single layers.
    """
    for name in ("--ep-experts-per-layer", "--mtp-num-layers"):
        if value(arguments, name) is not None:
            raise ConfigError(f"--tiny cannot shrink {name}; leave out {name}, or --tiny")
    tp = lcm(*(layout.parallel.tp * layout.parallel.expert_tp for layout in layouts))
    heads = 2 * tp
    hidden = heads * HEAD
    new = {
        "--num-attention-heads": heads,
        "--hidden-size": hidden,
        "--ffn-hidden-size": 2 * hidden,
        "--seq-length": SEQUENCE * lcm(*(layout.parallel.cp for layout in layouts)),
        "--micro-batch-size": 1,
        "--global-batch-size": 2 * lcm(*(layout.parallel.dp for layout in layouts)),
    }
    new["--max-position-embeddings"] = new["--seq-length"]
    smaller = {
        "--moe-ffn-hidden-size": hidden,
        "--moe-shared-expert-intermediate-size": hidden,
        "--num-query-groups": tp,
        "--kv-channels": HEAD,
        "--q-lora-rank": HEAD,
        "--kv-lora-rank": HEAD,
        "--qk-head-dim": HEAD,
        "--qk-pos-emb-head-dim": HEAD,
        "--v-head-dim": HEAD,
        "--ep-group-tokens": SEQUENCE // 4,
    }
    new |= {name: size for name, size in smaller.items() if value(arguments, name) is not None}
    pattern = _layers(arguments, lcm(*(layout.parallel.pp for layout in layouts)))
    new["--num-layers"] = len(pattern)
    words = {name: str(size) for name, size in new.items()}
    if value(arguments, "--num-experts") is not None:
        words["--moe-layer-freq"] = str(pattern).replace(" ", "")
        words["--num-experts"] = str(_experts(arguments, layouts))
    kept, removed = without(arguments, (*words, *DATA_FLAGS))
    words |= {"--tokenizer-type": "NullTokenizer", "--vocab-size": str(VOCABULARY)}
    return Arguments(kept, removed, [w for pair in words.items() for w in pair] + ["--mock-data"])


def _layers(arguments: list[str], pp: int) -> list[int]:
    """Return 0 or 1 for each layer that is kept: the model's last ones, two a stage at most."""
    depth = _number(arguments, "--num-layers", 2)
    frequency = value(arguments, "--moe-layer-freq") or "1"
    pattern = moe_layers(
        int(frequency) if frequency.isdecimal() else parse_layers(frequency, depth), depth
    )
    wanted = pp * (2 if depth >= 2 * pp else 1)
    kept = [int(moe) for moe in pattern[-wanted:]]
    return kept + [1] * (wanted - len(kept)) if any(kept) else [*kept[:-1], 1]


def _experts(arguments: list[str], layouts: Sequence[Layout]) -> int:
    """Return a number of experts, the user's at most where the layouts let it be."""
    topk = max(_number(arguments, "--moe-router-topk", 2), _number(arguments, "--ep-topk", 1))
    groups = max(
        _number(arguments, "--moe-router-num-groups", 1), _number(arguments, "--ep-num-groups", 1)
    )
    step = lcm(groups, *(layout.parallel.ep for layout in layouts))
    least = max(2 * topk, groups * topk if groups > 1 else 1)
    return -(-least // step) * step


def _number(arguments: list[str], name: str, default: int) -> int:
    text = value(arguments, name)
    if text is None:
        return default
    try:
        return int(text)
    except ValueError as error:
        raise ConfigError(f"{name} must be a whole number; got {text!r}") from error
