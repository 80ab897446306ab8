"""Megatron's arguments: our `--ep-*` flags, and every check that needs no communication."""

import argparse
import os
import sys
from typing import Any, NoReturn

from ep_plugin.config import ConfigError, MoEConfig, ParallelConfig, check_experts_over_ranks
from ep_plugin.megatron.settings import EdgeSettings
from ep_plugin.registry import available, resolve


def add_ep_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the plugin's flags in a group of their own."""
    group = parser.add_argument_group("expert parallelism (ep_plugin)")
    for kind, default, summary in (
        ("router", "topk", "which experts a token goes to"),
        ("dispatcher", "auto", "how rows reach their experts"),
        ("gemm", "auto", "the grouped matrix product under the experts"),
    ):
        choices = ", ".join((*_automatic(kind), *available(kind)))
        group.add_argument(
            f"--ep-{kind}", default=default, help=f"{summary}: {choices}, or a module of your own"
        )
    return parser


def _automatic(kind: str) -> tuple[str, ...]:
    return () if kind == "router" else ("auto",)


def settings_from_args(args: Any) -> EdgeSettings:
    """Return the `--ep-*` settings; raises ConfigError for a name that is no option."""
    chosen = EdgeSettings(args.ep_router, args.ep_dispatcher, args.ep_gemm)
    for kind, name in chosen._asdict().items():
        if name in _automatic(kind):
            continue
        if "." not in name and name not in available(kind):
            legal = ", ".join((*_automatic(kind), *available(kind)))
            raise ConfigError(f"--ep-{kind} must be one of {legal}; got {name!r}")
        resolve(kind, name)
    return chosen


def check_arguments(args: Any) -> None:
    """Raise ConfigError for a layout or a pattern that cannot work, before Megatron looks at it."""
    parallel = ParallelConfig(
        world_size=args.world_size,
        tp=args.tensor_model_parallel_size,
        pp=args.pipeline_model_parallel_size,
        cp=args.context_parallel_size,
        ep=args.expert_model_parallel_size,
        etp=args.expert_tensor_parallel_size,
        order="tp-cp-ep-pp-dp" if args.use_tp_pp_dp_mapping else "tp-cp-ep-dp-pp",
    )
    if args.num_experts is None:
        if parallel.ep > 1:
            raise ConfigError(
                f"--expert-model-parallel-size ({parallel.ep}) needs experts; "
                f"--num-experts {parallel.ep} would do"
            )
        return
    check_experts_over_ranks(args.num_experts, parallel.ep)
    MoEConfig(
        hidden_size=1, ffn_hidden_size=1, num_experts=args.num_experts, topk=args.moe_router_topk
    )
    pattern = args.moe_layer_freq
    if isinstance(pattern, list) and len(pattern) != args.num_layers:
        example = ([0, 1] * args.num_layers)[: args.num_layers]
        raise ConfigError(
            f"--moe-layer-freq must have one entry per layer, --num-layers ({args.num_layers}); "
            f"got {len(pattern)} entries: {pattern}; {example} would do"
        )


def refuse(error: ConfigError) -> NoReturn:
    """Print the error once for all ranks and exit with code 2."""
    if os.environ.get("RANK", "0") == "0":
        print(f"ep_plugin: error: {error}", file=sys.stderr, flush=True)
    sys.exit(2)
