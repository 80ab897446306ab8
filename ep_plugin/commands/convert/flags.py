"""The flags of `ep-plugin convert`, and where each of them acts; elsewhere it is refused.

None has a default here: what is absent was not typed.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

from ep_plugin.checkpoint.adapt.upcycling import MODES, RouterInit, SharedFrom, Upcycling
from ep_plugin.checkpoint.open import Format, Kind
from ep_plugin.errors import ConfigError
from ep_plugin.moe.routing_config import ScoreFunction
from ep_plugin.registry import available

TOLERANCE = 1e-4
Typed = dict[str, Any]  # destination of a flag that was typed -> value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    add = partial(parser.add_argument, default=argparse.SUPPRESS)
    add(
        "--from", dest="source", type=Path, metavar="SOURCE",
        help="what --save named, or one iter_NNNNNNN folder; or a Hugging Face model",
    )  # fmt: skip
    add(
        "--to", dest="target", type=Path, required=True, metavar="TARGET",
        help="folder to write; must be missing or empty",
    )  # fmt: skip
    _add_upcycling(parser)
    _add_formats(parser)
    add("--drop-optimizer", action="store_true", help="leave the optimizer's state out")
    add(
        "--ep", type=int, metavar="EP",
        help="expert-parallel size of the run that continues; model weights load at any, but "
        "Megatron keeps the optimizer in another way at EP = 1 (default: above 1)",
    )  # fmt: skip
    _add_comparison(parser)
    add(
        "--processes", type=int, metavar="N",
        help="processes that write at once; each holds a tensor or two (default: 1)",
    )  # fmt: skip
    add(
        "--check", action="store_true",
        help="compare the files of --to with its manifest.json instead; exit code 1: they differ",
    )  # fmt: skip
    add("--dry-run", action="store_true", help="print names, sizes and expected time only")
    add("--json", action="store_true", help="print one JSON object on stdout")


def _add_upcycling(parser: argparse.ArgumentParser) -> None:
    add, default = partial(parser.add_argument, default=argparse.SUPPRESS), Upcycling
    add("--num-experts", type=int, metavar="E", help="give each MoE layer so many experts")
    add("--topk", type=int, metavar="K", help="experts per token (default: the preset's)")
    add(
        "--layers", metavar="WHICH",
        help="which layers become MoE: all, every:N, or a pattern such as [0,1,0,1] (default: "
        f"{default.layers})",
    )  # fmt: skip
    add(
        "--mode", metavar="MODE",
        help=f"what experts are made of: {', '.join(available(MODES))} (default: {default.mode})",
    )  # fmt: skip
    add(
        "--granularity", type=int, metavar="G",
        help="in mode granular: how many experts each FFN is cut into",
    )  # fmt: skip
    add(
        "--drop-ratio", type=float, metavar="R",
        help="in mode drop: part of each expert's channels that is drawn anew (default: "
        f"{default.drop_ratio})",
    )  # fmt: skip
    add(
        "--noise-std", type=float, metavar="S",
        help="in mode noise: standard deviation of the noise, relative to the weights' (default: "
        f"{default.noise_std})",
    )  # fmt: skip
    add(
        "--router-init", choices=get_args(RouterInit),
        help="normal: random rows; virtual-group: random, equal for the experts of one FFN (the "
        "default in mode granular, needed there to keep the output); zero: equal logits, keeps the "
        "output whatever the gates, but the same experts see every token at first",
    )  # fmt: skip
    add(
        "--shared-expert", choices=get_args(SharedFrom),
        help="copy: the dense FFN beside the experts, each side with half of the output; learned: "
        "weighed by a learned softmax, as --ep-shared-expert learned. Both keep the output",
    )  # fmt: skip
    add("--preset", metavar="NAME", help="take top-k and gates of a system of `ep-plugin presets`")
    add(
        "--score-function", choices=get_args(ScoreFunction),
        help="score function of the gates (default: softmax)",
    )  # fmt: skip
    add(
        "--pre-softmax", action="store_true",
        help="softmax over all experts, not divided by the sum of the chosen",
    )  # fmt: skip
    add("--scaling-factor", type=float, metavar="F", help="factor on the gates (default: 1)")
    add("--seed", type=int, help=f"seed of all random draws (default: {default.seed})")


def _add_formats(parser: argparse.ArgumentParser) -> None:
    add = partial(parser.add_argument, default=argparse.SUPPRESS)
    add(
        "--format", choices=get_args(Format),
        help="what to write: torch_dist, or a Hugging Face folder (default: megatron)",
    )  # fmt: skip
    add(
        "--family", metavar="MODEL_TYPE",
        help="family of a Hugging Face output (default: the first whose models have these "
        "settings)",
    )  # fmt: skip
    add(
        "--transformer-impl", choices=("transformer_engine", "local"),
        help="implementation whose names a Megatron output has, where they differ (default: the "
        "source's, or transformer_engine)",
    )  # fmt: skip


def _add_comparison(parser: argparse.ArgumentParser) -> None:
    add = partial(parser.add_argument, default=argparse.SUPPRESS)
    add(
        "--parity-tolerance", type=float, metavar="D",
        help=f"largest allowed difference of a logit in float32 (default: {TOLERANCE})",
    )  # fmt: skip
    add("--skip-parity", action="store_true", help="do not compare source and result")
    add(
        "--verify", action="store_true",
        help="compare source and result, which is the default: each is run in float32 by its own "
        "software, Megatron or transformers, one in memory at a time",
    )  # fmt: skip
    add(
        "--prompts", type=Path, metavar="FILE",
        help="compare on these instead of random tokens: a prompt a line, for the tokenizer of a "
        "Hugging Face --from, or .json with lists of token ids",
    )  # fmt: skip


@dataclass(frozen=True)
class Need:
    """Flags that act only where `met`; typed elsewhere, they are refused with `sentence`."""

    flags: tuple[str, ...]
    met: Callable[[Typed, Kind], bool]
    sentence: str  # {flag}: the one that was typed; {mode}: of the experts


def _mode(typed: Typed) -> str:
    mode: str = typed.get("mode", "copy")
    return mode


def stays_torch_dist(typed: Typed, kind: Kind) -> bool:
    """Whether a torch_dist checkpoint is to become another one, so that names can stay."""
    return kind == "torch_dist" and typed.get("format", "megatron") == "megatron"


def _draws(typed: Typed, _: Kind) -> bool:
    """Whether anything is drawn: tokens, routers, or weights of experts."""
    if "skip_parity" not in typed and "prompts" not in typed:
        return True
    rows = typed.get("router_init") != "zero" or _mode(typed) in ("drop", "noise")
    return "num_experts" in typed and rows


NEEDS = (
    Need(
        (
            *("--topk", "--layers", "--mode", "--granularity", "--drop-ratio", "--noise-std"),
            *("--router-init", "--shared-expert", "--preset", "--score-function", "--pre-softmax"),
            "--scaling-factor",
        ),
        lambda typed, _: "num_experts" in typed,
        "{flag} is about new experts, and there are to be none; use --num-experts 8 too, or leave "
        "{flag} out",
    ),
    Need(
        ("--granularity",),
        lambda typed, _: _mode(typed) == "granular",
        "{flag} is for --mode granular, and --mode is {mode}; use --mode granular, or leave {flag} "
        "out",
    ),
    Need(
        ("--drop-ratio",),
        lambda typed, _: _mode(typed) == "drop",
        "{flag} is for --mode drop, and --mode is {mode}; use --mode drop, or leave {flag} out",
    ),
    Need(
        ("--noise-std",),
        lambda typed, _: _mode(typed) == "noise",
        "{flag} is for --mode noise, and --mode is {mode}; use --mode noise, or leave {flag} out",
    ),
    Need(
        ("--router-init",),
        lambda typed, _: typed["router_init"] != "virtual-group" or _mode(typed) == "granular",
        "{flag} virtual-group is for --mode granular, and --mode is {mode}; use {flag} normal",
    ),
    Need(
        ("--family",),
        lambda typed, _: typed.get("format") == "hf",
        "{flag} is for a Hugging Face output; use --format hf, or leave {flag} out",
    ),
    Need(
        ("--transformer-impl",),
        lambda typed, _: typed.get("format") != "hf",
        "{flag} is for a Megatron output; use --format megatron, or leave {flag} out",
    ),
    Need(
        ("--transformer-impl",),
        lambda typed, kind: kind != "torch_dist",
        "{flag} is not for a torch_dist source, whose names stay as they are; leave {flag} out",
    ),
    Need(
        ("--drop-optimizer", "--ep"),
        stays_torch_dist,
        "{flag} is about the optimizer's state, which goes along from torch_dist to torch_dist "
        "alone; leave {flag} out",
    ),
    Need(
        ("--ep",),
        lambda typed, _: "drop_optimizer" not in typed,
        "{flag} says how the optimizer is kept, and --drop-optimizer leaves it out; use one of the "
        "two",
    ),
    Need(
        ("--prompts", "--parity-tolerance", "--verify"),
        lambda typed, _: "skip_parity" not in typed,
        "{flag} is for the comparison, which --skip-parity leaves out; use one of the two",
    ),
    Need(("--seed",), _draws, "{flag} is for random draws, and this makes none; leave {flag} out"),
)


def refuse_idle_flags(typed: Typed, kind: Kind) -> None:
    """Raise ConfigError for a flag that was typed and would have no effect."""
    for need in NEEDS:
        for flag in need.flags:
            name = flag.removeprefix("--").replace("-", "_")
            if name in typed and not need.met(typed, kind):
                raise ConfigError(need.sentence.format(flag=flag, mode=_mode(typed)))


def refuse_unfinished(typed: Typed, kind: Kind) -> None:
    """Raise ConfigError where this kind of source needs a flag that was not typed."""
    if kind == "per-rank" and "skip_parity" not in typed:
        raise ConfigError(
            f"{typed['source']} is in per-rank files, which no program here can run to compare it "
            "with the result; use --skip-parity"
        )
    if "num_experts" not in typed and stays_torch_dist(typed, kind):
        raise ConfigError(
            f"{typed['source']} is a torch_dist checkpoint already; use --format hf, or "
            "--num-experts and --topk"
        )
