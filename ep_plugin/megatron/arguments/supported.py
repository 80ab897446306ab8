"""Settings of Megatron's that our block does not have.

One the plugin cannot honour is an error with its name and what to use instead; it is never changed
behind the user's back.
"""

from typing import Any

from ep_plugin.errors import ConfigError

# TransformerConfig field -> (legal values, the flag's name and what to write instead)
_LEGAL: dict[str, tuple[tuple[Any, ...], str]] = {
    "moe_router_load_balancing_type": (
        ("aux_loss", "seq_aux_loss", "global_aux_loss", "none"),
        "--moe-router-load-balancing-type aux_loss, seq_aux_loss, global_aux_loss or none, one",
    ),
    "moe_router_score_function": (
        ("softmax", "sigmoid"),
        "--moe-router-score-function softmax or sigmoid",
    ),
    "moe_router_force_load_balancing": ((False,), "no --moe-router-force-load-balancing"),
    "moe_router_force_biased": ((None,), "no --moe-router-force-biased"),
    "moe_pad_expert_input_to_capacity": ((False,), "no --moe-pad-expert-input-to-capacity"),
    "moe_expert_rank_capacity_factor": (
        (None,),
        "no --moe-expert-rank-capacity-factor; --ep-capacity-factor is an expert's",
    ),
    "moe_paged_stash": ((False,), "no --moe-paged-stash; --ep-save keeps less"),
    "moe_apply_probs_on_input": ((False,), "no --moe-apply-probs-on-input"),
    "moe_latent_size": ((None,), "no --moe-latent-size"),
    "moe_token_dispatcher_type": (
        ("allgather", "alltoall"),
        "--moe-token-dispatcher-type alltoall; --ep-dispatcher chooses ours",
    ),
    "moe_shared_expert_overlap": (
        (False,),
        "no --moe-shared-expert-overlap; --ep-overlap shared_expert is ours",
    ),
    "delay_wgrad_compute": ((False,), "no --delay-wgrad-compute"),
    "overlap_dispatch_backward_with_experts_wgrad": (
        (False,),
        "no --overlap-dispatch-backward-with-experts-wgrad; --ep-overlap chunked is ours",
    ),
    "moe_enable_routing_replay": ((False,), "no --moe-enable-routing-replay"),
    "moe_mlp_glu_interleave_size": ((None,), "no --moe-mlp-glu-interleave-size"),
    "activation_func_clamp_value": ((None,), "no --activation-func-clamp-value"),
    "fp4": ((None,), "no --fp4-format"),
    "transformer_impl": (
        ("local", "transformer_engine"),
        "--transformer-impl local or transformer_engine",
    ),
}


def check_supported(config: Any) -> None:
    """Raise ConfigError for the first setting of a TransformerConfig that we cannot honour."""
    recomputed = config.recompute_modules or ()
    if config.fp8 and config.moe_shared_expert_intermediate_size and "layernorm" in recomputed:
        raise ConfigError(
            f"--fp8-format ({config.fp8}) with a shared expert cannot recompute the layernorm "
            "before it; use --recompute-modules without layernorm"
        )
    for name, (legal, instead) in _LEGAL.items():
        value = one(getattr(config, name, legal[0]))
        if value not in legal:
            raise ConfigError(
                f"{name} = {value!r} is not supported by ep_plugin's MoE block; use {instead}"
            )


def one(value: Any) -> Any:
    """Return the element of a list of one, else the value itself."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value
