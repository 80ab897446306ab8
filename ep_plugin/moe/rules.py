"""When a setting acts: giving one that would do nothing is refused. Nothing here imports torch.

A setting acts, or is refused, or is idle by layout: what concerns exchanges does nothing on one
rank, and must be legal there, since a laptop and a cluster share one command line. So does
`rank_capacity` from the number of ranks on that share experts: no skew brings a rank more rows.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

from ep_plugin.errors import ConfigError
from ep_plugin.moe.routing_config import RoutingConfig


@dataclass(frozen=True)
class Need:
    """A setting acts only `when`; else giving it is a ConfigError: the setting, then `sentence`."""

    when: Callable[[Any], bool]  # of the finished MoEConfig, which imports this file
    sentence: str  # what it is for, and what to use, with settings in angle brackets
    values: tuple[Any, ...] = ()  # of this setting that need it; (): every one but the default


def own(name: str) -> bool:
    """Whether an option is a module of the user's own: only that knows which settings it reads."""
    return "." in name


def _drops(config: Any) -> bool:
    routing = config.routing
    return routing.capacity_factor is not None or routing.eval_capacity_factor is not None


def _through(*names: str) -> Callable[[Any], bool]:
    """Whether tokens travel through one of these dispatchers, or one of the user's own."""
    return lambda c: c.dispatcher in (*names, "auto", "local") or own(c.dispatcher)


_CAPACITY = (
    Need(
        _drops,
        "is about experts with a capacity, and there is none; use <capacity_factor=1.25> with "
        "<drop_policy=probs>",
    ),
)
_BALANCING = (
    Need(
        lambda c: c.routing.aux_loss_coeff > 0,
        "is about the load-balancing loss, and its coefficient is 0; use <aux_loss_coeff=0.01>",
    ),
)
_FP8_PRODUCTS = (
    "multiplies bf16 matrices, and <fp8> ({fp8}) has products of its own for all of them"
)

# "routing.FIELD" or "moe.FIELD" -> needs; a field without an entry always acts
NEEDS: dict[str, tuple[Need, ...]] = {
    "routing.normalize": (
        Need(
            lambda c: _drops(c) or c.routing.second_expert in ("random", "threshold"),
            "is about weights of choices that may be dropped, and none is; use "
            "<normalize=before_drop>, or <capacity_factor=1.25> with <drop_policy=probs>",
            values=("after_drop",),
        ),
    ),
    "routing.second_threshold": (
        Need(
            lambda c: c.routing.second_expert in ("random", "threshold"),
            "is the weight below which a second expert is left out; use <second_expert=threshold>",
        ),
    ),
    "routing.bias_update_rate": (
        Need(
            lambda c: c.routing.expert_bias,
            "is the step of the expert bias, and there is none; use <expert_bias=True>",
        ),
    ),
    "routing.quantile_ema": (
        Need(
            lambda c: c.routing.quantile_balancing,
            "is about the bias of quantile balancing, and there is none; use "
            "<quantile_balancing=True>",
        ),
    ),
    "routing.min_capacity": _CAPACITY,
    "routing.capacity_rounding": _CAPACITY,
    "routing.capacity_counts_topk": (
        *_CAPACITY,
        Need(
            lambda c: c.router != "expert_choice",
            "is about tokens that choose experts, and with <router=expert_choice> experts choose; "
            "use <router=topk>",
        ),
    ),
    "routing.group_tokens": (
        Need(
            lambda c: _drops(c) or c.routing.aux_loss_scope == "group",
            "is the size of the groups that a capacity or <aux_loss_scope=group> counts in; use "
            "<capacity_factor=1.25> with <drop_policy=probs>",
        ),
    ),
    "routing.aux_loss_counts": _BALANCING,
    "routing.aux_loss_scope": _BALANCING,
    "routing.aux_loss_layers": _BALANCING,
    "routing.further_losses": _BALANCING,
    "routing.force_expert_choice": (
        Need(
            lambda c: c.router == "expert_choice",
            "allows <router=expert_choice>, and <router> is {router}; use <router=expert_choice>",
        ),
    ),
    "moe.fp8_wgrad": (
        Need(
            lambda c: c.fp8 != "off",
            "is about the weight gradients of FP8 experts, and <fp8> is off; use <fp8=rowwise>",
        ),
    ),
    "moe.save": (
        Need(
            lambda c: not c.bias,
            "keeps less of experts without bias, and these have one; use <bias=False>",
        ),
    ),
    "moe.rank_capacity": (
        Need(
            lambda c: not c.bias,
            "bounds the room of experts without bias, and these have one; use <bias=False>",
        ),
        Need(
            lambda c: c.router != "expert_choice",
            "bounds what skew costs, and with <router=expert_choice> every expert takes as many "
            "tokens; use <router=topk>",
        ),
    ),
    "moe.dispatch_dedup": (
        Need(
            _through("alltoall"),
            "is about dispatcher alltoall, and through {dispatcher} a token travels once to a rank "
            "anyway; use <dispatcher=alltoall>",
            values=(True,),
        ),
    ),
    "moe.dispatch_dtype": (
        Need(
            lambda c: c.fp8 != "off" and c.fp8_wgrad == "fp8",
            "sends tokens as FP8 products read them, and not all are FP8: <fp8> is {fp8}, "
            "<fp8_wgrad> {fp8_wgrad}; use <fp8=rowwise> with <fp8_wgrad=fp8>, or "
            "<dispatch_dtype=bf16>",
        ),
        Need(
            _through("alltoall", "hierarchical"),
            "needs <dispatcher=alltoall> or <dispatcher=hierarchical>, and <dispatcher> is "
            "{dispatcher}; use <dispatcher=alltoall>",
        ),
    ),
    "moe.check_splits": (
        Need(
            _through("alltoall", "hierarchical"),
            "is about numbers that ranks tell each other before they send, and {dispatcher} tells "
            "none; use <dispatcher=alltoall>",
        ),
    ),
    "moe.comm_sms": (
        Need(
            lambda c: c.dispatcher == "symm_mem" or own(c.dispatcher),
            "is the number of SMs that dispatcher symm_mem copies with, and <dispatcher> is "
            "{dispatcher}; use <dispatcher=symm_mem>",
        ),
    ),
    "moe.overlap_chunks": (
        Need(
            lambda c: c.overlap == "chunked" or own(c.overlap),
            "is for <overlap=chunked>, and <overlap> is {overlap}; use <overlap=chunked> or "
            "<overlap_chunks=None>",
        ),
    ),
    "moe.gemm": (
        Need(
            lambda c: c.fp8 == "off" or c.fp8_wgrad == "bf16",
            f"{_FP8_PRODUCTS}; use <gemm=auto> or <fp8_wgrad=bf16>",
        ),
    ),
}
# What a router of tokens has and `expert_choice` has not: field of RoutingConfig -> why.
UNUSED_BY_EXPERT_CHOICE = {
    "topk": "lets experts choose",
    "normalize": "weighs by the softmax over experts",
    "drop_policy": "fills every expert alike",
    "aux_loss_coeff": "fills every expert alike",
    "z_loss_coeff": "adds no loss",
    "score_function": "weighs by the softmax over experts",
    "scaling_factor": "weighs by the softmax over experts",
    "expert_bias": "lets experts choose",
    "quantile_balancing": "lets experts choose",
    "force_load_balancing": "fills every expert alike",
    "num_groups": "lets experts choose",
    "second_expert": "lets experts choose",
    "noise": "lets experts choose",
}
# Of the model and the run, not a choice of the user's: legal whatever else is set.
FACTS = frozenset(
    {
        *("hidden_size", "ffn_hidden_size", "num_experts", "num_moe_layers", "routing"),
        *("in_graph", "tokens"),
    }
)
# What concerns exchanges: without effect on one rank of ep and etp, and legal there.
IDLE_AT_ONE_RANK = frozenset(
    {
        *("moe.dispatcher", "moe.dispatch_dedup", "moe.dispatch_dtype", "moe.check_splits"),
        *("moe.comm_sms", "moe.overlap", "moe.overlap_chunks"),
    }
)


def at_one_rank(config: Any) -> Any:
    """Return `config` for one rank that has all experts: a dispatcher of ours has no work there."""
    if own(config.dispatcher):
        return config
    return replace(config, dispatcher="local", comm_sms=type(config).comm_sms)


def given(config: Any) -> Iterator[tuple[str, Any]]:
    """Yield "routing.FIELD" or "moe.FIELD" and its value for each setting not at its default."""
    default = RoutingConfig()
    for field in fields(RoutingConfig):
        value = getattr(config.routing, field.name)
        if value != getattr(default, field.name):
            yield f"routing.{field.name}", value
    for field in fields(config):
        if field.name not in FACTS and getattr(config, field.name) != field.default:
            yield f"moe.{field.name}", getattr(config, field.name)


def check_needs(config: Any) -> None:
    """Raise ConfigError for a setting that would do nothing beside the others."""
    settings = dict(given(config))
    if config.router == "expert_choice":
        _check_expert_choice(config, settings)
    for name, value in settings.items():
        part, _, field = name.partition(".")
        if part == "routing" and own(config.router):
            continue
        for need in NEEDS.get(name, ()):
            if need.values and value not in need.values:
                continue
            if not need.when(config):
                shown = said(value) if isinstance(value, tuple) else value
                raise ConfigError(f"<{field}> ({shown}) {need.sentence.format(**vars(config))}")


def _check_expert_choice(config: Any, settings: dict[str, Any]) -> None:
    if config.routing.capacity_factor is None:
        raise ConfigError(
            "<router> (expert_choice) needs <capacity_factor>, the experts of an average token; "
            "got None; use <capacity_factor=2.0>"
        )
    for field, reason in UNUSED_BY_EXPERT_CHOICE.items():
        if f"routing.{field}" in settings:
            value, default = settings[f"routing.{field}"], getattr(RoutingConfig(), field)
            raise ConfigError(
                f"<router> (expert_choice) {reason}: <{field}> ({value}) has no meaning; use "
                f"<{field}={default}>"
            )


def said(value: Any) -> str:
    """Return a value as a user says it: on and off for True and False, pairs as NAME:NUMBER."""
    if isinstance(value, tuple):
        return ",".join(":".join(map(str, p)) if isinstance(p, tuple) else str(p) for p in value)
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)
