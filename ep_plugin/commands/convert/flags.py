"""The flags of `ep-plugin convert`. None has a default here: what is absent was not typed."""

import argparse
from functools import partial
from pathlib import Path
from typing import get_args

from ep_plugin.checkpoint.adapt.upcycling import MODES, RouterInit, SharedFrom, Upcycling
from ep_plugin.checkpoint.open import Format
from ep_plugin.checkpoint.opened import ModelClass
from ep_plugin.moe.routing_config import ScoreFunction
from ep_plugin.registry import available

TOLERANCE = 1e-4


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
    add(
        "--keep-layers", metavar="LAYERS",
        help="make a student of these layers of a Megatron GPT, counted from 0, such as 0-19,23, "
        "in this order; its optimizer starts afresh",
    )  # fmt: skip
    add(
        "--model-class", choices=get_args(ModelClass),
        help="make a HybridModel of a Megatron GPT, or a GPT of a HybridModel whose layers pair up "
        "to a GPT's, bit for bit; the optimizer goes on. With --num-experts it says what gets them "
        "(default: the source's class)",
    )  # fmt: skip
    add(
        "--hybrid-layer-pattern", metavar="PATTERN",
        help="make a HybridModel with this pattern, such as '*E*E|*E*E': for each layer of the GPT "
        "its attention (* or +) and its block (- or E), and | where pipeline stages are cut "
        "(default with --model-class hybrid: no cuts)",
    )  # fmt: skip
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
        "--vocab-size", type=int, metavar="V",
        help="rows of the vocabulary that do not pad it: the others are cut; from torch_dist to "
        "torch_dist they stay and the size is noted (default: what the checkpoint says of it)",
    )  # fmt: skip
    add(
        "--router", metavar="MODULE",
        help="the router of one's own that the source was trained with (--ep-router), such as "
        "my_package.my_router: it is imported, so its name is not taken from the checkpoint",
    )  # fmt: skip
    add(
        "--leave-out", nargs="+", metavar="NAME",
        help="run arguments of the source that are not to be in the result: those that hold an "
        "object of a class that is not Megatron's; _extra_state: what Transformer Engine keeps of "
        "its layers' FP8 scales",
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
