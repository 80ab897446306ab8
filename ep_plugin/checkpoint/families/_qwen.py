"""What Qwen's families share: windows that are not used, and which layers have experts."""

import argparse
from typing import Any

from ep_plugin.checkpoint.config_keys import Keys, refusal
from ep_plugin.checkpoint.families import _config
from ep_plugin.checkpoint.families._rope import rope_args
from ep_plugin.checkpoint.family import Config
from ep_plugin.checkpoint.moe_layers import moe_layers
from ep_plugin.errors import ConfigError
from ep_plugin.untrusted import shown

DEFAULTS = _config.ROUTED | {"norm_topk_prob": False, "decoder_sparse_step": 1}


def no_window(config: Keys) -> None:
    """Raise ConfigError where attention of a Qwen model has a window."""
    _config.refuse(config, "use_sliding_window", False)
    config.passed_over("sliding_window", "max_window_layers")
    if any(kind != "full_attention" for kind in config.listing("layer_types")):
        raise refusal(config, "layer_types", "full_attention in every layer")


def sparse_layers(config: Keys) -> list[int]:
    """Return 1 for each layer of a Qwen model with experts, 0 for the others."""
    dense, step = config.listing("mlp_only_layers"), config.get("decoder_sparse_step")
    if type(step) is not int or step < 1:
        raise refusal(config, "decoder_sparse_step", "a whole number of at least 1")
    if any(type(layer) is not int for layer in dense):
        raise refusal(config, "mlp_only_layers", "a list of whole numbers")
    without = set(dense)
    chosen = [
        int(layer not in without and (layer + 1) % step == 0)
        for layer in range(config["num_hidden_layers"])
    ]
    if not any(chosen):
        legal = f"experts in one layer at least (decoder_sparse_step is {step})"
        raise refusal(config, "mlp_only_layers", legal)
    return chosen


def qwen_moe_args(config: Keys) -> dict[str, Any]:
    """Return the arguments of Qwen's MoE models but those of attention heads."""
    no_window(config)
    names = [key for key in ("num_experts", "num_local_experts") if config.get(key)]  # both in use
    if not names:
        raise ConfigError(
            "config.json lacks num_experts or num_local_experts; give the config.json that came "
            "with the weights"
        )
    if config[names[0]] != config[names[-1]]:
        raise refusal(config, names[0], f"the {shown(config[names[-1]])} of {names[-1]}")
    num_experts = config.number(names[0], whole=True)
    normalized = config.get("norm_topk_prob")
    if not isinstance(normalized, bool):
        raise refusal(config, "norm_topk_prob", "true or false")
    experts = _config.experts_args(config, normalized, sparse_layers(config))
    rope, _ = rope_args(config)
    return _config.decoder_args(config) | rope | experts | {"num_experts": num_experts}


def qwen_moe_config(args: argparse.Namespace) -> Config:
    """Return what `qwen_moe_args` read."""
    chosen = moe_layers(args.moe_layer_freq, args.num_layers)
    return {
        **(_config.decoder_config(args) | _config.experts_config(args)),
        "num_experts": args.num_experts,
        "norm_topk_prob": not args.moe_router_pre_softmax,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [layer for layer, is_moe in enumerate(chosen) if not is_moe],
        "use_sliding_window": False,
    }
