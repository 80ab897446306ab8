"""The flags of `ep-plugin convert`, and what they say to make of a dense model."""

import argparse
from pathlib import Path
from typing import Any, get_args

from ep_plugin import presets
from ep_plugin.checkpoint.adapt.gains import Gates
from ep_plugin.checkpoint.adapt.settings import MODES, RouterInit, SharedFrom, Upcycling
from ep_plugin.errors import ConfigError
from ep_plugin.moe.routing_config import ScoreFunction
from ep_plugin.registry import available


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument(
        "--from", dest="source", type=Path, metavar="SOURCE",
        help="what --save named, or one iter_NNNNNNN folder; or a Hugging Face model",
    )  # fmt: skip
    parser.add_argument(
        "--to", dest="target", type=Path, required=True, metavar="TARGET",
        help="folder to write; must be missing or empty",
    )  # fmt: skip
    parser.add_argument("--num-experts", type=int, metavar="E")
    parser.add_argument(
        "--topk", type=int, metavar="K", help="experts per token (default: the preset's)"
    )
    parser.add_argument(
        "--layers", default="all", metavar="WHICH",
        help="which layers become MoE: all, every:N, or a pattern such as [0,1,0,1] (default: all)",
    )  # fmt: skip
    _add_upcycling(parser)
    parser.add_argument(
        "--seed", type=int, default=1234, help="of everything drawn (default: %(default)s)"
    )
    parser.add_argument(
        "--ep", type=int, metavar="EP",
        help="expert-parallel size of the run that continues; model weights load at any, but "
        "Megatron keeps the optimizer in another way at EP = 1 (default: above 1)",
    )  # fmt: skip
    parser.add_argument(
        "--drop-optimizer", action="store_true", help="leave the optimizer's state out"
    )
    parser.add_argument(
        "--parity-tolerance", type=float, default=1e-4, metavar="D",
        help="largest allowed difference of a logit in float32 (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--skip-parity", action="store_true", help="do not compare the models (needs no Megatron)"
    )
    _add_formats(parser)
    parser.add_argument(
        "--processes", type=int, default=1, metavar="N",
        help="that write at once; each holds a tensor or two (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--check", action="store_true",
        help="compare the files of --to with its manifest.json instead; exit code 1: they differ",
    )  # fmt: skip
    parser.add_argument(
        "--dry-run", action="store_true", help="print names, sizes and expected time only"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")


def _add_upcycling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--mode", default="copy", metavar="MODE",
        help=f"what experts are made of: {', '.join(available(MODES))} (default: copy)",
    )  # fmt: skip
    parser.add_argument(
        "--granularity", type=int, default=1, metavar="G", help="experts an FFN is cut into"
    )
    parser.add_argument(
        "--drop-ratio", type=float, default=0.5, metavar="R", help="of mode drop (default: 0.5)"
    )
    parser.add_argument(
        "--noise-std", type=float, default=0.01, metavar="S",
        help="of mode noise, relative to the weights' (default: 0.01)",
    )  # fmt: skip
    parser.add_argument(
        "--router-init", choices=get_args(RouterInit),
        help="normal: random rows; virtual-group: random, equal for the experts of one FFN (the "
        "default, and needed to keep the output, in mode granular); zero: equal logits, keeps the "
        "output whatever the gates, but the same experts see every token at first",
    )  # fmt: skip
    parser.add_argument(
        "--shared-expert", choices=get_args(SharedFrom), default="none",
        help="copy: the dense FFN beside the experts, each side with half of the output; learned: "
        "weighed by a learned softmax, as --ep-shared-expert learned. Both keep the output",
    )  # fmt: skip
    parser.add_argument(
        "--preset", metavar="NAME", help="take top-k and gates of a system of `ep-plugin presets`"
    )
    parser.add_argument(
        "--score-function", choices=get_args(ScoreFunction), help="of the gates (default: softmax)"
    )
    parser.add_argument(
        "--pre-softmax", action="store_true", default=None,
        help="softmax over all experts, not divided by the sum of the chosen",
    )  # fmt: skip
    parser.add_argument("--scaling-factor", type=float, metavar="F", help="of the gates")


def _add_formats(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--format", choices=("megatron", "hf"), default="megatron",
        help="of the output: torch_dist, or a Hugging Face folder (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--family", metavar="MODEL_TYPE",
        help="of a Hugging Face output (default: the first whose models have these settings)",
    )  # fmt: skip
    parser.add_argument(
        "--transformer-impl", choices=("transformer_engine", "local"),
        help="whose names a Megatron output has, where they differ (default: the source's, or "
        "transformer_engine)",
    )  # fmt: skip
    parser.add_argument(
        "--verify", action="store_true",
        help="compare logits, Hugging Face's model computed by transformers",
    )  # fmt: skip
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE",
        help="compare on these instead of random tokens: a prompt a line, for the tokenizer of a "
        "Hugging Face --from, or .json with lists of token ids",
    )  # fmt: skip


def settings_from(args: argparse.Namespace) -> Upcycling:
    """Return the settings; what is given beside --preset wins over it."""
    gates: dict[str, Any] = {}
    topk = args.topk
    if args.preset is not None:
        preset = presets.load(args.preset)
        if preset.router != "topk":
            raise ConfigError(
                f"--preset {args.preset} lets experts choose their tokens, so no token's weights "
                "have a known sum; use --topk 2, with --ep-router expert_choice in the run"
            )
        gates, topk = vars(Gates.of(preset.routing)), topk or preset.routing.topk
    if topk is None:
        raise ConfigError("--topk, or a --preset that has it, must be given; use --topk 2")
    for name in ("score_function", "pre_softmax", "scaling_factor"):
        if getattr(args, name) is not None:
            gates = {**gates, name: getattr(args, name)}
    default_init: RouterInit = "virtual-group" if args.mode == "granular" else "normal"
    router_init: RouterInit = args.router_init or default_init
    return Upcycling(
        num_experts=args.num_experts,
        topk=topk,
        layers=args.layers,
        seed=args.seed,
        mode=args.mode,
        granularity=args.granularity,
        drop_ratio=args.drop_ratio,
        noise_std=args.noise_std,
        router_init=router_init,
        shared_expert=args.shared_expert,
        gates=Gates(**gates),
        ep=args.ep,
    )
