"""Settings that several families share: config.json to Megatron's arguments and back."""

import argparse
from collections.abc import Sequence
from typing import Any

from ep_plugin.checkpoint.config_keys import Keys, refusal
from ep_plugin.checkpoint.families._rope import rope_args, rope_config
from ep_plugin.checkpoint.family import Config, query_groups
from ep_plugin.checkpoint.normalized import normalize_of
from ep_plugin.checkpoint.router_losses import whole_model_args, whole_model_config
from ep_plugin.errors import ConfigError
from ep_plugin.untrusted import shown

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
# What transformers takes for a key that config.json lacks. Sizes must be there.
DEFAULTS: dict[str, Any] = {
    "initializer_range": 0.02,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
ROUTED = {**DEFAULTS, "router_aux_loss_coef": 0.001}
# Keys of transformers' that must not say anything else.
_NEUTRAL: dict[str, Any] = {
    "attention_bias": False,
    "mlp_bias": False,
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "is_encoder_decoder": False,
    "tie_encoder_decoder": False,
    "pruned_heads": {},
    "is_causal": True,
    "residual_dropout": 0.0,
    "hidden_dropout": 0.0,
}

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
    "activation_func_clamp_value": None,
    "glu_linear_offset": 0.0,
    "softmax_scale": None,
}


def decoder_args(config: Keys, activation: str = "silu") -> dict[str, Any]:
    """Return the arguments of every decoder that `FIELDS` does not have, but rotary embeddings'."""
    refuse(config, "hidden_act", activation)
    for key, legal in _NEUTRAL.items():
        refuse(config, key, legal)
    tied = config.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise refusal(config, "tie_word_embeddings", "true or false")
    return {
        "untie_embeddings_and_output_weights": not tied,
        "seq_length": config["max_position_embeddings"],
        "transformer_impl": "transformer_engine",
        "use_rotary_position_embeddings": True,
        "attention_dropout": config.number("attention_dropout"),
        "hidden_dropout": 0.0,
    }


def decoder_config(args: argparse.Namespace) -> Config:
    """Return what `decoder_args` and `rope_args` read."""
    dropout = getattr(args, "attention_dropout", None)
    return {
        "hidden_act": "silu",
        "tie_word_embeddings": not args.untie_embeddings_and_output_weights,
        "attention_dropout": dropout or 0.0,
        **rope_config(args),
    }


def heads_args(config: Keys) -> dict[str, Any]:
    """Return the arguments of attention with query groups."""
    heads = config["num_attention_heads"]
    sizes = {
        "num_query_groups": config.get("num_key_value_heads", heads),
        "kv_channels": config.get("head_dim", config["hidden_size"] // heads),
    }
    for key, name in (("num_key_value_heads", "num_query_groups"), ("head_dim", "kv_channels")):
        if type(sizes[name]) is not int or sizes[name] < 1:
            raise refusal(config, key, "a positive whole number")
    if heads % sizes["num_query_groups"]:
        raise refusal(config, "num_key_value_heads", f"a divisor of num_attention_heads ({heads})")
    return {"group_query_attention": True, **sizes}


def dense_args(config: Keys, activation: str = "silu") -> dict[str, Any]:
    """Return all that `FIELDS` does not have of a decoder without experts."""
    rope, _ = rope_args(config)
    return decoder_args(config, activation) | rope | heads_args(config)


def heads_config(args: argparse.Namespace) -> Config:
    """Return what `heads_args` read."""
    return {"num_key_value_heads": query_groups(args), "head_dim": args.kv_channels}


def experts_args(config: Keys, normalized: bool, layers: Sequence[int]) -> dict[str, Any]:
    """Return the arguments of softmax routing to the k best, weights summing to 1 or not.

    `layers` has 1 for each layer with experts and 0 for the others.
    """
    return {
        "moe_layer_freq": 1 if all(layers) else list(layers),
        "moe_router_score_function": "softmax",
        "moe_router_pre_softmax": not normalized,
        "moe_router_topk_scaling_factor": None,
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": True,
        **whole_model_args(config, sum(layers)),
    }


def check_normalize(args: argparse.Namespace) -> None:
    """Raise ConfigError where our own setting of it is not what Megatron's arguments say.

    Those say whether a token's weights are divided by their sum before tokens are dropped.
    """
    ours, meant = getattr(args, "ep_normalize", None), normalize_of(args)
    if ours not in (None, meant):
        raise ConfigError(
            f"ep_normalize is {shown(ours)}, which config.json cannot say of this family; give a "
            f"model trained with --ep-normalize {meant}"
        )


def experts_config(args: argparse.Namespace) -> Config:
    """Return what `experts_args` read. Raises ConfigError for another kind of routing."""
    check_normalize(args)
    scale = getattr(args, "moe_router_topk_scaling_factor", None)
    if scale not in (None, 1.0):
        raise ConfigError(
            f"moe_router_topk_scaling_factor ({scale}) has no counterpart in this family; "
            "give a model with 1.0"
        )
    return whole_model_config(args)


def refuse(config: Config, key: str, legal: Any) -> None:
    """Raise ConfigError unless `key` is `legal`, or not there; None and False are one."""
    value = config.get(key, legal)
    same = value == legal and isinstance(value, bool) == isinstance(legal, bool)
    if not (same or all(one is None or one is False for one in (value, legal))):
        raise refusal(config, key, repr(legal))


def without_window() -> dict[str, Any]:
    """Return FIXED for families whose attention may have a window."""
    return {name: value for name, value in FIXED.items() if name != "window_size"}


def window_args(config: Keys) -> dict[str, Any]:
    """Return the window of attention: W tokens, this one included, are W - 1 to its left."""
    if config.get("sliding_window") is None:
        return {"window_size": None}
    window = config.number("sliding_window", whole=True)
    if window < 1:
        raise refusal(config, "sliding_window", "null, or a whole number of at least 1")
    return {"window_size": (window - 1, 0)}


def window_config(args: argparse.Namespace) -> Config:
    """Return what `window_args` read; a left side below 0 has no end."""
    window = getattr(args, "window_size", None)
    return {"sliding_window": None if window is None or window[0] < 0 else window[0] + 1}


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
        "ep_capacity_factor": None,
        "ep_eval_capacity_factor": None,
        "ep_second_expert": None,
        "ep_router": "topk",
        "ep_expert_activation": None,
        "ep_shared_expert": None,
        "ep_experts_per_layer": None,
    }
    return fixed | routing | changes


def with_shared_expert(**changes: Any) -> dict[str, Any]:
    """Return `moe_fixed` of a family that has a shared expert of any size."""
    fixed = moe_fixed(**changes)
    return {k: v for k, v in fixed.items() if k != "moe_shared_expert_intermediate_size"}
