"""Settings that several families share: config.json to Megatron's arguments and back."""

import argparse
from typing import Any

from ep_plugin.checkpoint.family import Config, query_groups
from ep_plugin.checkpoint.moe_layers import moe_layers
from ep_plugin.errors import ConfigError

FIELDS = {
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_attention_heads",
    "max_position_embeddings": "max_position_embeddings",
    "rms_norm_eps": "layernorm_epsilon",
    "initializer_range": "init_method_std",
    "vocab_size": "padded_vocab_size",
}
DENSE_FIELDS = {**FIELDS, "intermediate_size": "ffn_hidden_size"}
DEFAULTS = {"initializer_range": 0.02}

# A decoder as all of them are; a family changes what is its own.
FIXED: dict[str, Any] = {
    "normalization": "RMSNorm",
    "layernorm_zero_centered_gamma": False,
    "position_embedding_type": "rope",
    "rotary_interleaved": False,
    "rotary_percent": 1.0,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "qk_layernorm": False,
    "multi_latent_attention": False,
    "swiglu": True,
    "window_size": None,
    "num_experts": None,
    # what would change the function and has no place in config.json
    "qk_l2_norm": False,
    "softmax_type": "vanilla",
    "no_rope_freq": None,
    "rotary_seq_len_interpolation_factor": None,
    "window_attn_skip_freq": None,
    "use_mup": False,
    "ep_dense_activation": None,
}
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def decoder_args(config: Config) -> dict[str, Any]:
    """Return the arguments of every decoder that `FIELDS` does not have."""
    refuse(config, "hidden_act", "silu")
    refuse(config, "attention_bias", False)
    refuse(config, "mlp_bias", False)
    return {
        "untie_embeddings_and_output_weights": not config.get("tie_word_embeddings", False),
        "seq_length": config["max_position_embeddings"],
        "transformer_impl": "transformer_engine",
        "use_rotary_position_embeddings": True,
        **_rope_args(config),
    }


def decoder_config(args: argparse.Namespace) -> Config:
    """Return what `decoder_args` read."""
    return {
        "hidden_act": "silu",
        "tie_word_embeddings": not args.untie_embeddings_and_output_weights,
        **_rope_config(args),
    }


def heads_args(config: Config) -> dict[str, Any]:
    """Return the arguments of attention with query groups."""
    heads = config["num_attention_heads"]
    return {
        "group_query_attention": True,
        "num_query_groups": config.get("num_key_value_heads") or heads,
        "kv_channels": config.get("head_dim") or config["hidden_size"] // heads,
    }


def heads_config(args: argparse.Namespace) -> Config:
    """Return what `heads_args` read."""
    return {"num_key_value_heads": query_groups(args), "head_dim": args.kv_channels}


def experts_args(config: Config, normalized: bool) -> dict[str, Any]:
    """Return the arguments of softmax routing to the k best, weights summing to 1 or not."""
    return {
        "moe_layer_freq": 1,
        "moe_router_score_function": "softmax",
        "moe_router_pre_softmax": not normalized,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": config.get("router_aux_loss_coef", 0.0),
        "moe_router_topk_scaling_factor": None,
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": True,
    }


def experts_config(args: argparse.Namespace) -> Config:
    """Return what `experts_args` read. Raises ConfigError for another kind of routing."""
    scale = getattr(args, "moe_router_topk_scaling_factor", None)
    if scale not in (None, 1.0):
        raise ConfigError(
            f"moe_router_topk_scaling_factor ({scale}) has no counterpart in this family; "
            "give a model with 1.0"
        )
    coefficient = getattr(args, "moe_aux_loss_coeff", None)
    return {"router_aux_loss_coef": coefficient or 0.0}


def sparse_layers_args(config: Config) -> dict[str, Any]:
    """Return which layers of a Qwen model are MoE layers."""
    dense, step = set(config.get("mlp_only_layers") or ()), config.get("decoder_sparse_step", 1)
    chosen = [
        int(layer not in dense and (layer + 1) % step == 0)
        for layer in range(config["num_hidden_layers"])
    ]
    return {"moe_layer_freq": 1 if all(chosen) else chosen}


def refuse(config: Config, key: str, legal: Any) -> None:
    """Raise ConfigError unless `key` is `legal`, or not there."""
    value = config.get(key, legal)
    if (value or None) != (legal or None):
        raise ConfigError(
            f"config.json has {key} = {value!r}, which Megatron's GPT has no counterpart for here; "
            f"give a model with {legal!r}"
        )


def rope_scaling(config: Config) -> Config:
    """Return the settings of scaled rotary embeddings, their "rope_type" among them."""
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    return {**scaling, "rope_type": kind}


def rope_base(config: Config) -> float:
    """Return the base of rotary embeddings, from either spelling."""
    nested = config.get("rope_parameters") or {}
    base = float(nested.get("rope_theta") or config.get("rope_theta") or 10000.0)
    return int(base) if base.is_integer() else base  # Megatron's is a whole number


def _rope_args(config: Config) -> dict[str, Any]:
    scaling = rope_scaling(config)
    refuse(config, "partial_rotary_factor", 1.0)
    values = {"rotary_base": rope_base(config), "use_rope_scaling": False}
    if scaling["rope_type"] == "llama3":
        for key, legal in _LLAMA3.items():
            refuse(scaling, key, legal)
        return {**values, "use_rope_scaling": True, "rope_scaling_factor": scaling["factor"]}
    if scaling["rope_type"] not in ("default", "yarn"):  # yarn: a family of its own says so
        raise ConfigError(
            f"rope_type {scaling['rope_type']!r} has no counterpart in Megatron's GPT; give "
            "a model with default or llama3"
        )
    return values


def _rope_config(args: argparse.Namespace) -> Config:
    values: Config = {"rope_theta": float(args.rotary_base)}
    if getattr(args, "use_rope_scaling", False):
        scaling = {"rope_type": "llama3", "factor": float(args.rope_scaling_factor), **_LLAMA3}
        return {**values, "rope_scaling": scaling}
    return values


def without_window() -> dict[str, Any]:
    """Return FIXED for families whose attention may have a window."""
    return {name: value for name, value in FIXED.items() if name != "window_size"}


def window_args(config: Config) -> dict[str, Any]:
    """Return the window of attention: W tokens, this one included, are W - 1 to its left."""
    window = config.get("sliding_window")
    return {"window_size": None if window is None else (window - 1, 0)}


def window_config(args: argparse.Namespace) -> Config:
    """Return what `window_args` read."""
    window = getattr(args, "window_size", None)
    return {"sliding_window": None if window is None else window[0] + 1}


MOE_FIELDS = {
    **DENSE_FIELDS,
    "moe_intermediate_size": "moe_ffn_hidden_size",
    "num_experts_per_tok": "moe_router_topk",
}


def moe_fixed(**changes: Any) -> dict[str, Any]:
    """Return FIXED of a family with experts that softmax routes to, with `changes`."""
    fixed = {name: value for name, value in without_window().items() if name != "num_experts"}
    routing = {
        "moe_router_score_function": "softmax",
        "moe_router_enable_expert_bias": False,
        "moe_router_num_groups": None,
        "moe_shared_expert_gate": False,
        "moe_shared_expert_intermediate_size": None,
        "moe_expert_capacity_factor": None,
        "ep_router": "topk",
        "ep_expert_activation": None,
        "ep_shared_expert": None,
        "ep_experts_per_layer": None,
    }
    return fixed | routing | changes


def qwen_moe_args(config: Config) -> dict[str, Any]:
    """Return the arguments of Qwen's MoE models but those of attention heads."""
    refuse(config, "use_sliding_window", False)
    num_experts = config.get("num_experts", config.get("num_local_experts"))  # both are in use
    if not num_experts:
        raise ConfigError(
            "config.json lacks num_experts; give the config.json that came with the weights"
        )
    experts = experts_args(config, normalized=bool(config.get("norm_topk_prob", False)))
    layers = sparse_layers_args(config)
    return decoder_args(config) | experts | layers | {"num_experts": num_experts}


def qwen_moe_config(args: argparse.Namespace) -> Config:
    """Return what `qwen_moe_args` read."""
    chosen = moe_layers(args.moe_layer_freq, args.num_layers)
    return {
        **(decoder_config(args) | experts_config(args)),
        "num_experts": args.num_experts,
        "norm_topk_prob": not args.moe_router_pre_softmax,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [layer for layer, is_moe in enumerate(chosen) if not is_moe],
        "use_sliding_window": False,
    }


def with_shared_expert(**changes: Any) -> dict[str, Any]:
    """Return `moe_fixed` of a family that has a shared expert of any size."""
    fixed = moe_fixed(**changes)
    return {k: v for k, v in fixed.items() if k != "moe_shared_expert_intermediate_size"}
