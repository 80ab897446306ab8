"""`--tiny`: the same kind of model and data, at a size that any machine can run."""

from collections.abc import Sequence
from math import lcm

from ep_plugin.checkpoint.moe_layers import moe_layers, parse_layers
from ep_plugin.commands.parity.comparable import Arguments, is_number, value, without
from ep_plugin.commands.parity.layouts import Layout
from ep_plugin.errors import ConfigError
from ep_plugin.typed_words import WrongWord, of_flag
from ep_plugin.untrusted import shown

HEAD = 16  # size of one attention head
SEQUENCE = 32
VOCABULARY = 512
MOST_SIZES = 6  # of a pyramid, each twice as large as the one before
FLAT = 128  # what Megatron pads a vocabulary to, times TP
DATA_FLAGS = (
    *("--data-path", "--train-data-path", "--valid-data-path", "--test-data-path", "--split"),
    *("--data-args-path", "--per-split-data-args-path", "--data-cache-path", "--mock-data"),
    *("--per-dataset-sequences-path", "--dataloader-fast-cache-load", "--fim-data", "--sft"),
    *("--dataloader-defer-npy-index-mmap", "--object-storage-cache-path"),
    *("--tokenizer-type", "--tokenizer-model", "--vocab-file", "--merge-file", "--vocab-size"),
    *("--tiktoken-pattern", "--tiktoken-num-special-tokens", "--tokenizer-hf-use-fast"),
    *("--padded-vocab-size", "--no-pad-vocab-size", "--make-vocab-size-divisible-by"),
    *("--vocab-extra-ids", "--tokenizer-metadata", "--tokenizer-special-tokens"),
    *("--null-tokenizer-eod-id", "--null-tokenizer-pad-id"),
)
# Other names of sizes that are set, and files that hold some.
TAKEN_OUT = (
    *("--encoder-num-layers", "--encoder-seq-length", "--decoder-seq-length", "--batch-size"),
    *("--eval-global-batch-size", "--eval-micro-batch-size", "--step-batch-size-schedule"),
)
OF_FILES_AND_KINDS = (  # they say each layer's kind and size in a language of their own
    *("--hybrid-layer-pattern", "--hybrid-override-pattern", "--mtp-hybrid-override-pattern"),
    *("--heterogeneous-layers-config-path", "--heterogeneous-layers-config-encoded-json"),
)
PER_LAYER = ("--window-attn-skip-freq", "--no-rope-freq", "--linear-attention-freq")
PYRAMID, EXPERTS = "--ep-experts-per-layer", "--num-experts"
MODEL = ("--num-layers", "--encoder-num-layers", "--hidden-size")  # a model is described
NEW_MODEL = ("--moe-router-topk", "2", "--moe-aux-loss-coeff", "1e-2")  # where none is


def default_layout(arguments: list[str], tiny: bool) -> str:
    """Return the layout to look at when none is named."""
    return "ep=2" if has_experts(arguments) or (tiny and _is_new(arguments)) else "tp=2"


def has_experts(arguments: list[str]) -> bool:
    return value(arguments, EXPERTS) is not None


def shrink(arguments: list[str], layouts: Sequence[Layout]) -> Arguments:
    """Return the flags of a small model whose every size divides at every layout.

    Depth, widths, heads, experts, sequence, vocabulary and batch are made small; which kind of
    block, attention, activation and routing stays. Data are random (`--mock-data`). Where no model
    is described it is one with experts. Raises ConfigError for flags that describe single layers
    in another way than by numbers of experts.
    """
    for name in OF_FILES_AND_KINDS:
        if value(arguments, name) is not None:
            raise ConfigError(
                f"--tiny cannot shrink {name}, which describes each layer; use {name} without "
                "--tiny, or --tiny without it"
            )
    added = list(NEW_MODEL) if _is_new(arguments) else []
    arguments = arguments + added
    words = {name: str(size) for name, size in _sizes(arguments, layouts).items()}
    depth = _number(arguments, "--num-layers", _number(arguments, "--encoder-num-layers", 2))
    pyramid = _pyramid(arguments)
    stages = lcm(*(layout.parallel.pp for layout in layouts))
    pattern = _layers(arguments, depth, stages, len(set(pyramid)))
    words["--num-layers"] = str(len(pattern))
    if added or has_experts(arguments):
        words["--moe-layer-freq"] = _listed(pattern)
        counts = _counts(arguments, pyramid, sum(pattern), layouts)
        words[EXPERTS] = str(max(counts))
        if pyramid:
            words[PYRAMID] = ",".join(map(str, counts))
    for name in PER_LAYER:
        text = value(arguments, name)
        if text is not None and not is_number(text):
            each = _frequency(arguments, name, depth)
            words[name] = (
                _listed(_last(list(each), len(pattern))) if isinstance(each, list) else str(each)
            )
    if value(arguments, "--lr") is None:
        words["--lr"] = "1e-4"  # Adam's first steps make much of rounding
    kept, removed = without(arguments[: len(arguments) - len(added)], (*words, *TAKEN_OUT))
    kept, data = without(kept, DATA_FLAGS)
    tp = lcm(*(layout.parallel.tp for layout in layouts))
    vocabulary = -(-VOCABULARY // (FLAT * tp)) * FLAT * tp  # padded alike at every layout
    words |= {"--tokenizer-type": "NullTokenizer", "--vocab-size": str(vocabulary)}
    new = [word for pair in words.items() for word in pair]
    return Arguments(kept, removed + data, [*added, *new, "--mock-data"])


def _is_new(arguments: list[str]) -> bool:
    """Whether the flags describe no model."""
    return all(value(arguments, name) is None for name in MODEL)


def _sizes(arguments: list[str], layouts: Sequence[Layout]) -> dict[str, int | str]:
    """Return the new value of every size: those that each model has, and of others those given."""
    tp = lcm(*(layout.parallel.tp * layout.parallel.expert_tp for layout in layouts))
    heads = 2 * tp
    hidden = heads * HEAD
    sequence = SEQUENCE * lcm(*(layout.parallel.cp for layout in layouts))
    new: dict[str, int | str] = {
        "--num-attention-heads": heads,
        "--hidden-size": hidden,
        "--ffn-hidden-size": 2 * hidden,
        "--seq-length": sequence,
        "--max-position-embeddings": sequence,
        "--micro-batch-size": 1,
        "--global-batch-size": 2 * lcm(*(layout.parallel.dp for layout in layouts)),
    }
    smaller: dict[str, int | str] = {
        **dict.fromkeys(("--moe-ffn-hidden-size", "--moe-shared-expert-intermediate-size"), hidden),
        **dict.fromkeys(("--num-query-groups", "--mamba-num-groups", "--linear-num-key-heads"), tp),
        **dict.fromkeys(("--mamba-num-heads", "--linear-num-value-heads"), heads),
        **dict.fromkeys(("--kv-channels", "--q-lora-rank", "--kv-lora-rank", "--v-head-dim"), HEAD),
        **dict.fromkeys(("--qk-head-dim", "--qk-pos-emb-head-dim", "--mamba-head-dim"), HEAD),
        **dict.fromkeys(("--mamba-state-dim", "--dsa-indexer-head-dim"), HEAD),
        **dict.fromkeys(("--linear-key-head-dim", "--linear-value-head-dim"), HEAD),
        "--dsa-indexer-n-heads": tp,
        "--dsa-indexer-topk": SEQUENCE // 4,
        "--window-size": f"{SEQUENCE // 4},0",
        "--ep-group-tokens": SEQUENCE // 4,
        "--mtp-num-layers": min(_number(arguments, "--mtp-num-layers", 0), 2),
        "--recompute-num-layers": 1,
    }
    return new | {name: size for name, size in smaller.items() if value(arguments, name)}


def _layers(arguments: list[str], depth: int, pp: int, sizes: int) -> list[int]:
    """Return 0 or 1 for each layer that is kept: the model's last ones.

    They are two a stage at most; of a pyramid so many that each of its `sizes` has a layer, and
    two at least have experts.
    """
    whole = moe_layers(_frequency(arguments, "--moe-layer-freq", depth), depth)
    needed = max(2, sizes) if sizes else 0
    wanted = pp * (2 if depth >= 2 * pp else 1)
    while sum(whole[-wanted:]) < needed and wanted < depth:
        wanted += pp
    kept = [int(moe) for moe in whole[-wanted:]]
    kept += [1] * (wanted - len(kept)) if any(kept) else []
    if not any(kept):
        kept = [0] * (wanted - 1) + [1]
    while sum(kept) < needed:
        kept += [1] * pp
    return kept


def _frequency(arguments: list[str], name: str, depth: int) -> int | list[int]:
    """Return N, for every Nth layer, or 0 or 1 for each of `depth` layers."""
    text = value(arguments, name) or "1"
    if is_number(text) and int(text) > 0:
        return int(text)
    try:
        return parse_layers(text, depth)
    except ConfigError as error:
        raise ConfigError(
            f"{name} must be a number of layers, or 0 or 1 for each of the {depth} layers that "
            f"--num-layers has; got {text!r}; use {name} '[1]*{depth}'"
        ) from error


def _pyramid(arguments: list[str]) -> list[int]:
    """Return the experts of each MoE layer of a pyramid; none where there is no pyramid."""
    from ep_plugin.megatron.arguments.parser import experts_per_layer

    text = value(arguments, PYRAMID)
    if text is None:
        return []
    try:
        given = list(experts_per_layer(text))
    except WrongWord as error:
        raise of_flag(PYRAMID, str(error)) from error
    if len(set(given)) > MOST_SIZES:
        raise ConfigError(
            f"--tiny keeps {MOST_SIZES} different numbers of experts at most, and {PYRAMID} has "
            f"{len(set(given))}; use fewer, or leave out --tiny"
        )
    return given


def _counts(
    arguments: list[str], given: list[int], num_moe_layers: int, layouts: Sequence[Layout]
) -> list[int]:
    """Return the experts of each MoE layer: all as few as go, or a pyramid that doubles.

    A pyramid, `given`, keeps all its sizes and their order: of each the last layer, and further
    ones from the end. Where a layout gives a layer several copies of its experts, so it does here.
    """
    even = _experts(arguments, layouts)
    if not given:
        return [even] * num_moe_layers
    order = sorted(set(given))
    copies = any(number % layout.parallel.ep for number in given for layout in layouts)
    halves = copies and len(order) > 1 and even % 2 == 0 and _groups(arguments) == 1
    smallest = even // 2 if halves else even
    return [smallest * 2 ** order.index(count) for count in _chosen(given, num_moe_layers)]


def _chosen(given: list[int], wanted: int) -> list[int]:
    """Return so many of the items, in their order: of each kind the last one, then the last."""
    last = {item: place for place, item in enumerate(given)}
    others = [place for place in reversed(range(len(given))) if place not in last.values()]
    places = [*last.values(), *others][:wanted]
    return _last([given[place] for place in sorted(places)], wanted)


def _last(items: list[int], wanted: int) -> list[int]:
    """Return so many of the last items, or all with the last one repeated."""
    return items[-wanted:] + [items[-1]] * (wanted - len(items))


def _listed(pattern: list[int]) -> str:
    return str(pattern).replace(" ", "")


def _experts(arguments: list[str], layouts: Sequence[Layout]) -> int:
    """Return a number of experts, the user's at most where the layouts let it be."""
    topk = max(_number(arguments, "--moe-router-topk", 2), _number(arguments, "--ep-topk", 1))
    groups = _groups(arguments)
    step = lcm(groups, *(layout.parallel.ep for layout in layouts))
    least = max(2 * topk, groups * topk if groups > 1 else 1)
    return -(-least // step) * step


def _groups(arguments: list[str]) -> int:
    names = "--moe-router-num-groups", "--ep-num-groups"
    return max(_number(arguments, name, 1) for name in names)


def _number(arguments: list[str], name: str, default: int) -> int:
    text = value(arguments, name)
    if text is None:
        return default
    if not is_number(text):
        raise ConfigError(f"{name} must be a whole number; got {shown(text)}; use {name} {default}")
    return int(text)
