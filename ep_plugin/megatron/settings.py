"""Megatron's words in ours: TransformerConfig to MoEConfig, and the settings we refuse.

A Megatron setting the plugin cannot honour is an error with its name and what to use instead; it is
never changed behind the user's back.
"""

from typing import Any, NamedTuple

import torch.nn.functional as F

from ep_plugin.config import Activation, ConfigError, MoEConfig


class EdgeSettings(NamedTuple):
    """The `--ep-*` flags."""

    router: str = "topk"
    dispatcher: str = "auto"
    gemm: str = "auto"


# TransformerConfig field -> (legal values, the flag's name and what to write instead)
_LEGAL: dict[str, tuple[tuple[Any, ...], str]] = {
    "moe_router_load_balancing_type": (
        ("aux_loss", "none"),
        "--moe-router-load-balancing-type aux_loss or none",
    ),
    "moe_router_score_function": (("softmax",), "--moe-router-score-function softmax"),
    "moe_router_num_groups": ((None,), "no --moe-router-num-groups"),
    "moe_router_topk_scaling_factor": ((None, 1.0), "no --moe-router-topk-scaling-factor"),
    "moe_router_enable_expert_bias": ((False,), "no --moe-router-enable-expert-bias"),
    "moe_router_force_load_balancing": ((False,), "no --moe-router-force-load-balancing"),
    "moe_expert_capacity_factor": ((None,), "no --moe-expert-capacity-factor"),
    "moe_input_jitter_eps": ((None,), "no --moe-input-jitter-eps"),
    "moe_apply_probs_on_input": ((False,), "no --moe-apply-probs-on-input"),
    "moe_latent_size": ((None,), "no --moe-latent-size"),
    "moe_token_dispatcher_type": (
        ("allgather", "alltoall"),
        "--moe-token-dispatcher-type alltoall; --ep-dispatcher chooses ours",
    ),
    "moe_shared_expert_overlap": ((False,), "no --moe-shared-expert-overlap"),
    "overlap_moe_expert_parallel_comm": ((False,), "no --overlap-moe-expert-parallel-comm"),
    "moe_enable_routing_replay": ((False,), "no --moe-enable-routing-replay"),
    "moe_mlp_glu_interleave_size": ((None,), "no --moe-mlp-glu-interleave-size"),
    "activation_func_clamp_value": ((None,), "no --activation-func-clamp-value"),
    "fp8": ((None,), "no --fp8-format"),
    "fp4": ((None,), "no --fp4-format"),
    "transformer_impl": (
        ("local", "transformer_engine"),
        "--transformer-impl local or transformer_engine",
    ),
}

_ACTIVATIONS: dict[tuple[Any, bool], Activation] = {
    (F.silu, True): "swiglu",
    (F.gelu, True): "geglu",
    (F.gelu, False): "gelu",
    (F.relu, False): "relu",
}


def check_supported(config: Any) -> None:
    """Raise ConfigError for the first setting of a TransformerConfig that we cannot honour."""
    for field, (legal, instead) in _LEGAL.items():
        value = getattr(config, field, legal[0])
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if value not in legal:
            raise ConfigError(
                f"{field} = {value!r} is not supported by ep_plugin's MoE block; use {instead}"
            )


def moe_config(config: Any, settings: EdgeSettings) -> MoEConfig:
    """Return our configuration of one block for a Megatron TransformerConfig.

    Raises ConfigError for settings that have no counterpart.
    """
    check_supported(config)
    activation = _ACTIVATIONS.get((config.activation_func, config.gated_linear_unit))
    if activation is None:
        raise ConfigError(
            f"activation {config.activation_func} with gated_linear_unit = "
            f"{config.gated_linear_unit} is not supported; --swiglu would do"
        )
    aux_loss = config.moe_router_load_balancing_type in ("aux_loss", ["aux_loss"])
    coefficient = config.moe_aux_loss_coeff
    return MoEConfig(
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.moe_ffn_hidden_size or config.ffn_hidden_size,
        num_experts=config.num_moe_experts,
        topk=config.moe_router_topk,
        activation=activation,
        bias=config.add_bias_linear,
        normalize="none" if config.moe_router_pre_softmax else "topk",
        router_dtype="fp64" if config.moe_router_dtype == "fp64" else "fp32",
        aux_loss_coeff=_one(coefficient) if aux_loss else 0.0,
        z_loss_coeff=config.moe_z_loss_coeff or 0.0,
        router=settings.router,
        dispatcher=settings.dispatcher,
        gemm=settings.gemm,
    )


def _one(value: float | list[float]) -> float:
    return float(value[0] if isinstance(value, list) else value)
