"""Do source and result compute the same? Asked of Megatron and of `transformers`, in float32 on the
CPU.

Each model is loaded by the software that its folder is for and given the same tokens. One layer of
one model is in memory at a time, one model where Megatron has a tensor for all layers.
"""

import json
import re
import sys
from collections import Counter
from dataclasses import dataclass
from importlib import import_module
from math import prod
from pathlib import Path
from typing import Any

from ep_plugin.checkpoint.moe_layers import pattern
from ep_plugin.checkpoint.prompts import MAX_SEQUENCE, TokenBatch, draw, fill
from ep_plugin.checkpoint.target import Target, check_padding_token
from ep_plugin.commands.convert.request import Request
from ep_plugin.commands.convert.run_model import aside, run_model, run_source, worker
from ep_plugin.commands.numbers import rounded
from ep_plugin.errors import BackendUnavailable, ConfigError
from ep_plugin.extras import pip_install

REPORT = "parity.json"
NUM_TOKENS = 512  # random ones, for a model of Hugging Face's
_NUMBERED = re.compile(r"\blayers\.(\d+)\.")
TOKENS_PER_EXPERT = 32  # on average and at least; so that no expert of a random router goes unseen


class Differs(Exception):
    """The result does not compute what the source computes."""


@dataclass(frozen=True)
class Need:
    """What a comparison takes, known before anything is written."""

    tokens: int
    prompts: int | None  # None: random tokens
    seed: int
    tolerance: float
    memory_bytes: int  # about, at most: see `_need`
    at_a_time: str  # layer or model

    def sentence(self) -> str:
        """Return that for a reader."""
        return (
            f"then source and result are run on {self.on()}, one {self.at_a_time} in memory at a "
            f"time, in float32: about {rounded(self.memory_bytes / 2**30, 2)} GiB; they must agree "
            f"to {self.tolerance:g}; --skip-parity leaves it out"
        )

    def on(self) -> str:
        """Return which tokens they are."""
        if self.prompts is None:
            return f"{self.tokens} random tokens (--seed {self.seed})"
        return f"{self.tokens} tokens of {self.prompts} prompts"


@dataclass(frozen=True)
class Comparison:
    """What two models are run on."""

    batch: TokenBatch
    need: Need


def need(request: Request, target: Target) -> Need | None:
    """Return what the comparison takes, or None where there is to be none.

    Raises ConfigError for prompts with tokens of another vocabulary, and for a source that
    transformers cannot load.
    """
    if not request.compare or request.renames:
        return None
    check_padding_token(target.model.folder)
    return _need(request, target, _tokens(request, target))


def _need(request: Request, target: Target, batch: TokenBatch) -> Need:
    """The memory is that of the largest layer in float32, which is there four times while it is
    loaded and cut, of embedding and output, there twice, and of what both models computed.

    Where one tensor of Megatron's is of all layers, they are loaded together, and there twice.
    """
    args = target.model.args
    layer, all_layers, outside = _weights(target)
    names = (name for pair in target.name_map for name in pair)
    by_layer = not any(".layers." in name and not _NUMBERED.search(name) for name in names)
    values = args.num_layers * args.hidden_size + args.padded_vocab_size  # of a token, a model
    weights = 2 * outside + (4 * layer if by_layer else 2 * all_layers)
    return Need(
        tokens=int(batch.kept.sum()),
        prompts=None if request.prompts is None else len(request.prompts),
        seed=request.seed,
        tolerance=request.tolerance,
        memory_bytes=4 * (weights + 2 * batch.tokens.numel() * values),
        at_a_time="layer" if by_layer else "model",
    )


def _weights(target: Target) -> tuple[int, int, int]:
    """Return the parameters of the largest layer, of all layers, and of what is outside of them."""
    layers: Counter[str] = Counter()
    outside = 0
    for tensor in target.tensors:
        size = prod(tensor.info.shape)
        numbered = _NUMBERED.search(tensor.name)
        if tensor.name.startswith("optimizer."):
            continue
        if numbered or ".layers." in tensor.name:
            layers[numbered[1] if numbered else ""] += size
        else:
            outside += size
    return max(layers.values(), default=0), layers.total(), outside


def _check_memory(need: Need) -> None:
    """Raise ConfigError where the machine says that it has less memory free than that."""
    found = re.search(r"MemAvailable: +(\d+) kB", _read(Path("/proc/meminfo")))
    free = int(found[1]) * 1024 if found else need.memory_bytes
    if free < need.memory_bytes:
        raise ConfigError(
            f"the comparison needs about {need.memory_bytes / 2**30:.2f} GiB of memory, and "
            f"{free / 2**30:.2f} are free; use --skip-parity, or a machine with more"
        )


def _read(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


def load_compare(request: Request, target: Target) -> Comparison | None:
    """Import what the comparison needs and say what it takes; None where there is to be none.

    Raises BackendUnavailable where a package is missing, ConfigError as `need` does and for want of
    memory.
    """
    if not request.compare:
        return None
    hf, megatron = _with_transformers(request), not (request.kind == request.format == "hf")
    names = ["transformers"] * hf + ["megatron-core with megatron.training"] * megatron
    try:
        with aside():
            if hf:
                import_module("transformers")
            if megatron:
                worker()
    except ImportError as error:
        extras = ["hf"] * hf + ["megatron"] * megatron
        raise BackendUnavailable(
            f"the comparison needs {' and '.join(names)} ({error}); use {pip_install(*extras)}, "
            "or use --skip-parity"
        ) from error
    check_padding_token(target.model.folder)
    batch = _tokens(request, target)
    wanted = _need(request, target, batch)
    print(wanted.sentence(), file=sys.stderr)
    _check_memory(wanted)
    return Comparison(batch, wanted)


def compare(
    comparison: Comparison | None, request: Request, target: Target, folder: Path
) -> dict[str, Any] | None:
    """Compare the source with the result in `folder`, and keep the report there.

    Raises Differs where the result is to keep the function and does not.
    """
    if comparison is None:
        return None
    written = folder if target.iteration is None else folder / target.iteration
    with aside():
        report = _report(comparison, request, target, written)
    same = report["logits_max_abs_diff"] <= request.tolerance  # False for nan
    deviations = list(target.model.deviations)
    report |= {"tolerance": request.tolerance, "deviations": deviations, "same": same}
    report["passed"] = same or bool(deviations)
    (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n")
    print(_table(report, comparison.need), file=sys.stderr if request.json else sys.stdout)
    if not report["passed"]:
        raise Differs(
            f"comparison failed: logits differ by {report['logits_max_abs_diff']:.3e}, more than "
            f"--parity-tolerance {request.tolerance:.1e}; {request.target} was not written; look "
            "for a setting of the source that the result cannot have, or use --skip-parity to "
            "write it all the same"
        )
    return report


def _report(
    comparison: Comparison, request: Request, target: Target, written: Path
) -> dict[str, Any]:
    """Run both models; return the largest differences, and how large the values are."""
    batch, seed = comparison.batch, request.seed
    old = run_source(target.model.folder, batch.tokens, seed, request.router)
    new = run_model(written, batch.tokens, seed)
    made = target.model.upcycled
    is_moe = pattern(target.model.args) if made is None else made.moe_layers
    layers = []
    for layer, (before, after) in enumerate(zip(old.layers, new.layers, strict=True)):
        row = {
            "layer": layer,
            "moe": is_moe[layer],
            "experts_used": new.experts_used.get(layer),
            "max_abs_diff": batch.max_abs(before - after),
            "max_abs": batch.max_abs(before),
        }
        layers.append(row)
    return {
        "logits_max_abs_diff": batch.max_abs(old.logits[..., : new.logits.shape[-1]] - new.logits),
        "logits_max_abs": batch.max_abs(old.logits),
        "layers": layers,
        "tokens": comparison.need.tokens,
        "prompts": comparison.need.prompts,
        "sequence_length": batch.tokens.shape[1],
        "seed": seed,
        "dtype": "float32",
    }


def _table(report: dict[str, Any], wanted: Need) -> str:
    """Return the report for a reader."""
    lines = [f"source and result in {report['dtype']}, {wanted.on()}:"]
    lines.append("  output of         max |difference|     max |source|")
    rows = [
        (f"layer {row['layer']}", row["max_abs_diff"], row["max_abs"]) for row in report["layers"]
    ]
    rows.append(("logits", report["logits_max_abs_diff"], report["logits_max_abs"]))
    lines += [f"  {name:<18}{difference:>16.3e}{size:>17.3e}" for name, difference, size in rows]
    return "\n".join(
        [*lines, *(f"  the model's output changes: {reason}" for reason in report["deviations"])]
    )


def _tokens(request: Request, target: Target) -> TokenBatch:
    """Return the tokens; random ones are enough to reach every expert of Megatron's."""
    args, hf = target.model.args, _with_transformers(request)
    length = args.max_position_embeddings
    if not hf:
        length = min(args.seq_length, length)
    if request.prompts is not None:
        return fill(request.prompts, args.padded_vocab_size, length)
    many = max(2 * min(length, MAX_SEQUENCE), TOKENS_PER_EXPERT * (args.num_experts or 0))
    return draw(NUM_TOKENS if hf else many, args.padded_vocab_size, length, request.seed)


def _with_transformers(request: Request) -> bool:
    """Whether one of the two is a Hugging Face model."""
    return "hf" in (request.kind, request.format)
