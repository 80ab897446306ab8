"""The `--ep-*` flags: one for each field of RoutingConfig, and those of the block itself.

A field that Megatron has a flag for shares its destination: `--ep-topk` and `--moe-router-topk` are
two names of one argument, and the last one on the command line wins. The others are ours alone and
None when not given.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ep_plugin.errors import ConfigError
from ep_plugin.moe.config import (
    Activation,
    CheckSplits,
    DispatchDtype,
    Fp8,
    Fp8Wgrad,
    Save,
    SharedExpert,
)
from ep_plugin.moe.routing_config import RoutingConfig
from ep_plugin.registry import available

# field -> (Megatron's argument, or None when it has none; help)
ROUTING: dict[str, tuple[str | None, str]] = {
    "topk": ("moe_router_topk", "experts a token goes to"),
    "score_function": ("moe_router_score_function", "what makes scores of logits"),
    "normalize": (None, "divide a token's weights by their sum, before or after dropping"),
    "scaling_factor": ("moe_router_topk_scaling_factor", "factor of the weights"),
    "router_dtype": (None, "dtype of the logits; default fp32, or --moe-router-dtype"),
    "router_bias": (None, "a bias in the router; default as the other linear layers"),
    "jitter_eps": ("moe_input_jitter_eps", "router input times U[1-eps, 1+eps], training"),
    "noise": (None, "Gumbel noise on the logits chooses, training"),
    "second_expert": (None, "how the second expert of top-2 is found"),
    "second_threshold": (None, "weight below which random and threshold leave it out"),
    "num_groups": ("moe_router_num_groups", "groups of experts"),
    "group_topk": ("moe_router_group_topk", "groups a token may choose in"),
    "group_score_topk": (None, "best experts whose scores add up to a group's; default K / groups"),
    "expert_bias": ("moe_router_enable_expert_bias", "balance by a bias instead of a loss"),
    "bias_update_rate": ("moe_router_bias_update_rate", "step of that bias"),
    "capacity_factor": (None, "tokens an expert takes, over its fair share; default: all"),
    "eval_capacity_factor": (None, "the same in evaluation; default: all"),
    "min_capacity": (None, "tokens an expert takes at least"),
    "capacity_rounding": (None, "how a capacity becomes a whole number"),
    "capacity_counts_topk": (None, "whether the fair share is S*K/E or S/E"),
    "drop_policy": (None, "who goes when an expert is full"),
    "group_tokens": (None, "tokens of a routing group; default: all of a rank"),
    "aux_loss_coeff": ("moe_aux_loss_coeff", "coefficient of the load-balancing loss"),
    "aux_loss_counts": (None, "choices that the load-balancing loss counts"),
    "aux_loss_scope": (None, "tokens it is taken over"),
    "aux_loss_layers": (None, "its sum or its mean over layers"),
    "z_loss_coeff": ("moe_z_loss_coeff", "coefficient of the router z-loss"),
    "force_expert_choice": (None, "allow --ep-router expert_choice, which sees later tokens"),
}
BLOCK: dict[str, tuple[Any, str]] = {  # name -> (type, help)
    "dense_activation": (Activation, "of the dense feed-forward blocks"),
    "expert_activation": (Activation, "of the experts; default as the dense blocks"),
    "fp8": (Fp8, "recipe of the experts' products; weights and sums stay as they are"),
    "fp8_wgrad": (Fp8Wgrad, "their weight gradients, where --ep-fp8 is not off"),
    "save": (Save, "how the experts' pre-activations are kept for the backward"),
    "deterministic": (bool, "equal bits in every run: no kernel is chosen by measuring"),
    "dispatch_dtype": (DispatchDtype, "what tokens travel in; fp8 as FP8 products read them"),
    "dispatch_dedup": (bool, "a token travels once to a rank, not once for each expert there"),
    "check_splits": (CheckSplits, "when ranks compare what they send before they send it"),
    "comm_sms": (int, "SMs that --ep-dispatcher symm_mem copies with; default 32"),
    "ranks_per_node": (int, "that --ep-dispatcher hierarchical counts on; default torchrun's"),
    "overlap_chunks": (int, "parts the other ranks' tokens come in, for --ep-overlap chunked"),
    "shared_expert": (SharedExpert, "add the shared expert, or weigh it by a learned softmax"),
}
KINDS = (
    ("router", "topk", "which experts a token goes to"),
    ("dispatcher", "auto", "how rows reach their experts"),
    ("gemm", "auto", "the grouped matrix product under the experts"),
    ("overlap", "serial", "what is computed while tokens travel"),
)


@dataclass(frozen=True)
class _Value:
    """How a flag's text is read."""

    read: Callable[[str], Any]
    choices: tuple[str, ...] | None = None
    metavar: str | None = None


def _on_off(text: str) -> bool:
    if text not in ("on", "off"):
        raise argparse.ArgumentTypeError(f"must be on or off; got {text!r}")
    return text == "on"


def _value(hint: Any) -> _Value:
    """Return how a field of type `hint` is read: Literal, bool, or a number that may be None."""
    if get_origin(hint) is Literal:
        return _Value(str, choices=get_args(hint))
    if hint is bool:
        return _Value(_on_off, metavar="{on,off}")
    number: type = next(kind for kind in get_args(hint) or (hint,) if kind is not type(None))
    return _Value(number)


def experts_per_layer(text: str) -> tuple[int, ...]:
    """Read "32*10,64*2": one number of experts for each MoE layer, first to last."""
    try:
        runs = [part.partition("*") for part in text.split(",")]
        counts = tuple(int(n) for n, star, times in runs for _ in range(int(times) if star else 1))
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"must be numbers of experts, as 32*10,64*2; got {text!r}"
        ) from error
    if not counts or min(counts) < 1:
        raise argparse.ArgumentTypeError(f"must name at least 1 expert a layer; got {text!r}")
    return counts


def automatic(kind: str) -> tuple[str, ...]:
    """Return `auto` for the kinds that have it."""
    return () if kind in ("router", "overlap") else ("auto",)


def add_ep_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the plugin's flags in a group of their own, and make `--ep-preset` work."""
    group = parser.add_argument_group("expert parallelism (ep_plugin)")
    group.add_argument(
        "--ep-preset", metavar="NAME", help="a published system's model and routing: see presets"
    )
    for kind, default, summary in KINDS:
        choices = ", ".join((*automatic(kind), *available(kind)))
        group.add_argument(
            f"--ep-{kind}", default=default, help=f"{summary}: {choices}, or a module of your own"
        )
    hints = get_type_hints(RoutingConfig)
    for field in fields(RoutingConfig):
        argument, summary = ROUTING[field.name]
        _add(group, field.name, argument, _value(hints[field.name]), summary)
    for name, (hint, summary) in BLOCK.items():
        _add(group, name, None, _value(hint), summary)
    layers = _Value(experts_per_layer, metavar="N*LAYERS,...")
    _add(group, "experts_per_layer", None, layers, "experts of each MoE layer (a pyramid)")
    group.add_argument(
        "--ep-optimizer-format",
        choices=("fully_reshardable", "dp_reshardable"),
        default="fully_reshardable",
        help="how the distributed optimizer is saved: to be resumed at any layout, or at this one",
    )
    group.add_argument(
        "--ep-audit-save",
        action="store_true",
        help="read every checkpoint after it was saved, and stop when it is not whole: audit",
    )
    group.add_argument("--ep-parity-dump", metavar="FOLDER", help=argparse.SUPPRESS)
    _expand_presets(parser)
    return parser


def _add(group: Any, name: str, argument: str | None, value: _Value, summary: str) -> None:
    settings: dict[str, Any] = {"type": value.read, "choices": value.choices}
    if value.metavar is not None:
        settings["metavar"] = value.metavar
    if argument is not None:
        summary += f"; the same as --{argument.replace('_', '-')}"
        settings |= {"dest": argument, "default": argparse.SUPPRESS}
    group.add_argument(f"--ep-{name.replace('_', '-')}", help=summary, **settings)


def _expand_presets(parser: argparse.ArgumentParser) -> None:
    """Put the arguments of `--ep-preset NAME` before those given, so that the given ones win."""
    original = parser.parse_known_args

    def parse_known_args(args: Any = None, namespace: Any = None) -> Any:
        return original(with_preset(sys.argv[1:] if args is None else list(args)), namespace)

    parser.parse_known_args = parse_known_args  # type: ignore[method-assign]


def with_preset(arguments: list[str]) -> list[str]:
    """Return `arguments` behind those of the preset they name; exits for an unknown name."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--ep-preset")
    name = finder.parse_known_args(arguments)[0].ep_preset
    if name is None:
        return arguments
    from ep_plugin.megatron.arguments.spell import megatron_arguments
    from ep_plugin.megatron.seams.refusal import refuse
    from ep_plugin.presets import load

    try:
        return [*megatron_arguments(load(name)), *arguments]
    except ConfigError as error:
        refuse(error)
