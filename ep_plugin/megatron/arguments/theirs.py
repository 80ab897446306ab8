"""Refusal of Megatron's own settings that nobody would honour, in the words a user typed.

`theirs_table.py` says of every setting what becomes of it. Nothing here imports torch or Megatron.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ep_plugin.checkpoint.moe_layers import has_dense_layer
from ep_plugin.errors import ConfigError
from ep_plugin.megatron.arguments.theirs_next import NEXT
from ep_plugin.megatron.arguments.theirs_table import THEIRS, Theirs

BY_FIELD = {row.field: row for row in (*THEIRS, *NEXT)}


def check(theirs: Any, ours: Any = None) -> None:
    """Raise ConfigError for the first of Megatron's settings that our block cannot honour.

    `theirs` are parsed arguments, before or after `validate_args`, or a TransformerConfig. `ours`
    is an EdgeSettings; None: the `--ep-*` flags among the arguments, if any. Without experts
    every setting is Megatron's own, and none is refused.
    """
    given = Given(theirs, ours)
    if not (given.num_experts or given.num_moe_experts):
        return
    for row in BY_FIELD.values():
        if hasattr(theirs, row.field):
            _check_row(row, given)
    for field, is_refused, sentence in BESIDE:
        if is_refused(given):
            raise ConfigError(f"{_subject(BY_FIELD[field], given)} {sentence}")


@dataclass(frozen=True)
class Given:
    """Megatron's settings, as attributes, with the plugin's beside them."""

    theirs: Any
    ours: Any = None

    def __getattr__(self, name: str) -> Any:
        """Return a setting of Megatron's, None where this release has none."""
        return one(getattr(self.theirs, name, None))

    def own(self, name: str) -> Any:
        """Return a setting of the plugin's, None where it was not given."""
        if self.ours is not None:
            return getattr(self.ours, name, self.ours.routing.get(name))
        return getattr(self.theirs, f"ep_{name}", None)

    @property
    def is_arguments(self) -> bool:
        """Whether these are arguments, which a user types as flags."""
        return hasattr(self.theirs, "num_experts")

    @property
    def selective(self) -> bool:
        """Whether Megatron reads `recompute_modules`."""
        asked = self.recompute_granularity == "selective"
        return bool(asked or self.recompute_activations or self.moe_layer_recompute)

    @property
    def recomputed(self) -> list[str]:
        """Return the modules to recompute."""
        named = several(self.recompute_modules) if self.selective else []
        return [*named, "moe"] if self.moe_layer_recompute else named


_PAIRS = (("silu", True), ("gelu", True), ("gelu_tanh", True), ("gelu", False), ("relu", False))


def _is_no_pair(given: Given) -> bool:
    pair = _plain(given.activation_func), bool(given.gated_linear_unit)
    unasked = given.activation_func is None or given.own("expert_activation") is not None
    return not (unasked or pair in _PAIRS)


def _has_biases(field: str) -> Callable[[Given], bool]:
    return lambda given: bool(getattr(given, field) and given.add_bias_linear)


def _keeps_activation(given: Given) -> bool:
    parts = given.recomputed
    return bool(given.add_bias_linear) and "moe_act" in parts and "moe" not in parts


def _keeps_shared_expert(given: Given) -> bool:
    size, parts = given.moe_shared_expert_intermediate_size, given.recomputed
    return bool(size) and "shared_experts" in parts and "moe" not in parts


def _has_no_shared_expert(given: Given) -> bool:
    return not given.moe_shared_expert_intermediate_size and "shared_experts" in given.recomputed


def _is_not_grouped(given: Given) -> bool:
    return "moe_act" in given.recomputed and not given.moe_grouped_gemm


def _loses_layernorm(given: Given) -> bool:
    size, parts = given.moe_shared_expert_intermediate_size, given.recomputed
    return bool(given.fp8 and size) and "layernorm" in parts


def _recomputes_biases(given: Given) -> bool:
    """Whether a dense block that returns a bias is recomputed: its backward calls itself for ever.

    Megatron's recomputed block returns the bias parameter itself, which then is its own result.
    With `--fp8-format` Transformer Engine recomputes.
    """
    recomputed = "mlp" in given.recomputed and not given.fp8
    return bool(recomputed and given.add_bias_linear and has_dense_layer(given.theirs))


def _mixes(types: list[str]) -> bool:
    alone = {"none", "quantile_balancing"} & set(types)
    return len(set(types)) < len(types) or bool(alone and types[1:])


def _is_no_pairing(given: Given) -> bool:
    types = several(given.moe_router_load_balancing_type)
    return bool(types) and len(several(given.moe_aux_loss_coeff)) not in (0, len(types))


def _drops_by_quantile(given: Given) -> bool:
    factor = given.moe_expert_capacity_factor
    quantile = given.moe_router_load_balancing_type == "quantile_balancing"
    return factor is not None and factor >= 0 and quantile


def _recomputes_nothing(given: Given) -> bool:
    """Whether parts were named that nothing recomputes; a config has core_attn as its default."""
    named = several(given.recompute_modules)
    return (
        given.is_arguments
        and named not in ([], ["core_attn"])
        and not (given.selective or given.recompute_granularity)
    )


def _has_capacity(given: Given) -> bool:
    ours = given.own("capacity_factor"), given.own("eval_capacity_factor")
    return (given.moe_expert_capacity_factor, *ours) != (None, None, None)


def _without_shared_expert(field: str) -> Callable[[Given], bool]:
    return lambda given: bool(
        getattr(given, field) and not given.moe_shared_expert_intermediate_size
    )


def _without_schedule(given: Given) -> bool:
    both = given.overlap_moe_expert_parallel_comm or given.own("overlap") == "two_batch"
    return bool(given.high_priority_a2a_comm_stream and not both)


def _offloads_nothing(given: Given) -> bool:
    on = given.fine_grained_activation_offloading
    return given.is_arguments and bool(several(given.offload_modules)) and not on


def _keeps_no_quantile(given: Given) -> bool:
    types, own = several(given.moe_router_load_balancing_type), given.own("quantile_balancing")
    asked = given.moe_router_quantile_balancing_ema and given.own("quantile_ema") is None
    return bool(asked and types != ["quantile_balancing"] and not own)


def _drops_nothing(given: Given) -> bool:
    policy = given.moe_token_drop_policy
    return policy not in (None, "probs") and not _has_capacity(given)  # probs: the default


_SHARED = "--moe-shared-expert-intermediate-size 2048 beside it"
# Legal values that are refused beside another setting: field, when, the rest of the sentence.
BESIDE: tuple[tuple[str, Callable[[Given], bool], str], ...] = (
    (
        "moe_router_load_balancing_type",
        lambda given: _mixes(several(given.moe_router_load_balancing_type)),
        "must be losses that differ, and none and quantile_balancing stand alone; use "
        "--moe-router-load-balancing-type aux_loss seq_aux_loss with --moe-aux-loss-coeff 0.1 0.1",
    ),
    (
        "moe_aux_loss_coeff",
        _is_no_pairing,
        "must be a number for each of --moe-router-load-balancing-type; use "
        "--moe-router-load-balancing-type aux_loss with --moe-aux-loss-coeff 1e-2",
    ),
    (
        "moe_expert_capacity_factor",
        _drops_by_quantile,
        "does not go with quantile balancing in Megatron; use --ep-capacity-factor 1.25 in its "
        "place",
    ),
    (
        "moe_pad_expert_input_to_capacity",
        lambda given: given.moe_pad_expert_input_to_capacity and not _has_capacity(given),
        "pads experts to a capacity, and there is none; use --moe-expert-capacity-factor 1.25 "
        "beside it",
    ),
    *(
        (field, _without_shared_expert(field), f"{what}, and there is none; use {_SHARED}")
        for field, what in (
            ("moe_shared_expert_overlap", "computes a shared expert while tokens travel"),
            ("moe_shared_expert_gate", "weighs a shared expert"),
            ("moe_shared_expert_glu_interleave_size", "is about the rows of a shared expert"),
            ("use_grouped_gemm_for_shared_expert", "is about the products of a shared expert"),
        )
    ),
    (
        "high_priority_a2a_comm_stream",
        _without_schedule,
        "is about two micro-batches at once, and this run has one at a time; use --ep-overlap "
        "two_batch with --bf16, or leave it out",
    ),
    (
        "moe_enable_deepep",
        lambda given: (
            given.moe_enable_deepep and given.moe_flex_dispatcher_backend not in (None, "deepep")
        ),
        "and another --moe-flex-dispatcher-backend contradict each other; use "
        "--moe-token-dispatcher-type flex in its place",
    ),
    (
        "moe_router_quantile_balancing_ema",
        _keeps_no_quantile,
        "is about the bias of quantile balancing, and there is none; use "
        "--moe-router-load-balancing-type quantile_balancing beside it",
    ),
    (
        "fp8_recipe",
        lambda given: (
            given.is_arguments and given.fp8_recipe not in (None, "delayed") and not given.fp8
        ),
        "is read with --fp8-format alone; use --fp8-format hybrid beside it",
    ),
    (
        "offload_modules",
        _offloads_nothing,
        "is read with --fine-grained-activation-offloading alone; use "
        "--fine-grained-activation-offloading with it",
    ),
    (
        "fine_grained_activation_offloading",
        lambda given: (
            given.fine_grained_activation_offloading and not several(given.offload_modules)
        ),
        "moves what --offload-modules names, and it names nothing; use --offload-modules core_attn "
        "beside it",
    ),
    (
        "moe_shared_expert_overlap",
        lambda given: given.moe_shared_expert_overlap and given.overlap_moe_expert_parallel_comm,
        "and --overlap-moe-expert-parallel-comm are two orders of the same exchanges; use one of "
        "them",
    ),
    (
        "moe_token_drop_policy",
        _drops_nothing,
        "says who goes when an expert is full, and none has a capacity; use "
        "--moe-expert-capacity-factor 1.25 beside it",
    ),
    (
        "gated_linear_unit",
        _is_no_pair,
        "and activation_func are a pair that the experts do not have; use --ep-expert-activation "
        "swiglu, geglu, geglu_tanh, gelu or relu",
    ),
    (
        "moe_shared_expert_gate",
        _has_biases("moe_shared_expert_gate"),
        "needs linear layers without bias; use --disable-bias-linear or --ep-shared-expert learned",
    ),
    (
        "moe_shared_expert_glu_interleave_size",
        _has_biases("moe_shared_expert_glu_interleave_size"),
        "needs linear layers without bias; use --disable-bias-linear",
    ),
    (
        "recompute_modules",
        _recomputes_nothing,
        "is read with --recompute-granularity selective alone; use --recompute-granularity "
        "selective beside it",
    ),
    (
        "recompute_modules",
        _keeps_activation,
        "has moe_act, and experts with biases keep their activation; use --recompute-modules moe",
    ),
    (
        "recompute_modules",
        _keeps_shared_expert,
        "has shared_experts, which our block does not recompute alone; use --recompute-modules moe",
    ),
    (
        "recompute_modules",
        _has_no_shared_expert,
        "has shared_experts, and this model has none; use --recompute-modules moe",
    ),
    (
        "recompute_modules",
        _is_not_grouped,
        "has moe_act, which Megatron takes beside --moe-grouped-gemm alone; use --moe-grouped-gemm",
    ),
    (
        "recompute_modules",
        _recomputes_biases,
        "has mlp, and in Megatron the backward of a recomputed dense block with biases never ends; "
        "use --disable-bias-linear, or --recompute-modules moe",
    ),
    (
        "recompute_modules",
        _loses_layernorm,
        "has layernorm, which --fp8-format with a shared expert cannot recompute; use "
        "--recompute-modules moe",
    ),
)


def _check_row(row: Theirs, given: Given) -> None:
    value = getattr(given, row.field)
    refused = row.effect == "refused" and value not in row.off
    illegal = row.effect == "acts" and bool(row.legal) and not _is_legal(row, value)
    if (refused or illegal) and row.when(given):
        advice = "" if "; " in row.why else f"; use {choices(row)}"
        raise ConfigError(f"{_subject(row, given)} {row.why}{advice}")


def _is_legal(row: Theirs, value: Any) -> bool:
    return all(_plain(part) in row.legal for part in several(value))


def _subject(row: Theirs, given: Given) -> str:
    """Return what the user gave: a flag with its value, or `field=value` in Python."""
    value = getattr(given, row.field)
    if not given.is_arguments or row.flag == "":
        return f"{row.field}={_text(value)}"
    return row.name if isinstance(value, bool) else f"{row.name} ({_text(value)})"


def choices(row: Theirs) -> str:
    """Return the flag with the values that are honoured, as a way out."""
    *most, last = map(str, row.legal)
    return f"{row.name} {', '.join(most)} or {last}"


def _text(value: Any) -> str:
    return " ".join(str(_plain(part)) for part in several(value))


def several(value: Any) -> list[Any]:
    """Return the values of a setting that may have several; [] for None."""
    if isinstance(value, list | tuple):
        return list(value)
    return [] if value is None else [value]


def _plain(value: Any) -> Any:
    """Return the name of a function or of a member of an enumeration, any other value as it is."""
    return getattr(value, "__name__", None) or getattr(value, "name", value)


def one(value: Any) -> Any:
    """Return the element of a list of one, else the value itself."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value
