"""Megatron's flags that change only speed, replaced by options of ours, with a line to print.

Results do not depend on them. Imports neither torch nor Megatron.
"""

from collections.abc import Mapping
from typing import Any

from ep_plugin.checkpoint.normalized import normalize_of
from ep_plugin.errors import BackendUnavailable, ConfigError
from ep_plugin.megatron.arguments.table import expert_ranks
from ep_plugin.megatron.arguments.theirs import BY_FIELD, check
from ep_plugin.megatron.edge_settings import EdgeSettings
from ep_plugin.registry import resolve

FLEX = {"deepep": "deepep", "hybridep": "auto", "ncclep": "auto"}  # flex backend -> dispatcher

TYPE, BACKEND = "--moe-token-dispatcher-type", "--moe-flex-dispatcher-backend"
_BY = ": changes speed alone; tokens travel by --ep-dispatcher"


def flex_dispatcher(config: Any) -> str | None:
    """Return our dispatcher in place of Megatron's flex dispatcher; None if flex is not set.

    Raises ConfigError for a backend that is not in FLEX, which a configuration in Python may have.
    """
    if not _is_flex(config) and not getattr(config, "moe_enable_deepep", False):
        return None
    backend = _backend(config)
    if backend not in FLEX:
        raise ConfigError(
            f"{BACKEND} must be one of {', '.join(FLEX)}; got {backend!r}; use {BACKEND} deepep"
        )
    return FLEX[backend]


def _is_flex(config: Any) -> bool:
    return getattr(config, "moe_token_dispatcher_type", None) == "flex"


def _backend(config: Any) -> str:
    """Return the flex dispatcher's backend; deepep is Megatron's default."""
    return getattr(config, "moe_flex_dispatcher_backend", None) or "deepep"


def overlaps_shared_expert(config: Any) -> bool:
    """Whether Megatron's own flag asks to compute the shared expert while tokens travel."""
    asked = getattr(config, "moe_shared_expert_overlap", False)
    return bool(asked and config.moe_shared_expert_intermediate_size)


def take_speed(args: Any, typed: Mapping[str, str]) -> list[str]:
    """Set our options in `args` in place of Megatron's flags; return the lines to print.

    A flag of ours in `typed` wins. Megatron's flags are reset to their defaults, since Megatron
    checks them for its own MoE layer. Raises ConfigError for a value we have no option for, or if
    the package deep_ep is needed and does not load.
    """
    if args.num_experts is None:
        return []
    check(args)
    flex, overlap = _take_flex(args, typed), _take_overlap(args, typed)
    return [*flex, *overlap, *_take_the_rest(args, typed), *_unread_softmax(args, typed)]


def _unread_softmax(args: Any, typed: Mapping[str, str]) -> list[str]:
    """Return the line on a flag about softmax that many command lines have beside sigmoid."""
    ours = getattr(args, "ep_normalize", None)
    softmax = getattr(args, "moe_router_score_function", "softmax") == "softmax"
    if "--moe-router-pre-softmax" not in typed or ours is not None or softmax:
        return []
    return [
        "--moe-router-pre-softmax: without effect beside --moe-router-score-function "
        f"{args.moe_router_score_function}, in Megatron too; weights run by --ep-normalize "
        f"{normalize_of(args)}"
    ]


def _take_flex(args: Any, typed: Mapping[str, str]) -> list[str]:
    ours = flex_dispatcher(args)
    if ours is None:
        return _without_flex(args, typed)
    flex = f"{TYPE} flex ({_backend(args)})"
    said = flex if _is_flex(args) else "--moe-enable-deepep"
    args.moe_token_dispatcher_type, args.moe_enable_deepep = "alltoall", False
    if hasattr(args, "moe_flex_dispatcher_backend"):
        args.moe_flex_dispatcher_backend = "deepep"
    if "--ep-dispatcher" not in typed:
        args.ep_dispatcher = "auto" if expert_ranks(args) == 1 else ours
    if args.ep_dispatcher == "deepep" and "--ep-dispatcher" not in typed:
        try:
            resolve("dispatcher", "deepep")
        except BackendUnavailable as error:
            raise ConfigError(
                f"{said} needs the package deep_ep, which is not here or does not load; use "
                "--ep-dispatcher auto beside it"
            ) from error
    return [f"{said}{_BY} {args.ep_dispatcher}"]


def _without_flex(args: Any, typed: Mapping[str, str]) -> list[str]:
    """Return the line on the type of dispatcher that was typed, where ours is another.

    Raises ConfigError for a backend of the flex dispatcher, which is not used.
    """
    kind = args.moe_token_dispatcher_type
    if BACKEND in typed or _backend(args) != "deepep":
        raise ConfigError(
            f"{BACKEND} ({_backend(args)}) is about --moe-token-dispatcher-type flex, and this run "
            f"has {kind}; use --moe-token-dispatcher-type flex beside it"
        )
    if TYPE not in typed or (kind == "alltoall" and args.ep_dispatcher in ("auto", kind)):
        return []
    return [f"{TYPE} {kind}{_BY} {args.ep_dispatcher}"]


def _take_overlap(args: Any, typed: Mapping[str, str]) -> list[str]:
    if not overlaps_shared_expert(args):
        return []
    args.moe_shared_expert_overlap = False
    if "--ep-overlap" not in typed:
        args.ep_overlap = "shared_expert"
    return [
        "--moe-shared-expert-overlap: changes speed alone; layers run by --ep-overlap "
        f"{args.ep_overlap}"
    ]


def _take_the_rest(args: Any, typed: Mapping[str, str]) -> list[str]:
    """Return a line on the typed flags that have no effect in our MoE layers."""
    args.moe_pad_expert_input_to_capacity = False
    if hasattr(args, "moe_flex_dispatcher_num_sms"):  # from 0.19 on it refuses two that differ
        args.moe_deepep_num_sms = args.moe_hybridep_num_sms = None
    rows = {flag: BY_FIELD[dest] for flag, dest in typed.items() if dest in BY_FIELD}
    idle = sorted(flag for flag, row in rows.items() if row.effect == "no effect")
    if not idle:
        return []
    return [
        f"{', '.join(idle)}: without effect in our MoE layers, which compute the same without; all "
        "other layers follow as usual"
    ]


DEFAULT = EdgeSettings()


def dispatcher(config: Any, settings: EdgeSettings) -> str:
    """Return the dispatcher for a Megatron `config` made in Python, without a command line."""
    if settings.dispatcher != DEFAULT.dispatcher:
        return settings.dispatcher
    return flex_dispatcher(config) or settings.dispatcher


def overlap(config: Any, settings: EdgeSettings) -> str:
    """Return the schedule for a Megatron `config` made in Python, without a command line."""
    if settings.overlap != DEFAULT.overlap or not overlaps_shared_expert(config):
        return settings.overlap
    return "shared_expert"
