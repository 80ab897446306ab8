"""Mixtral: Mistral with experts in every layer, weights of the chosen ones summing to 1."""

import argparse
from typing import Any

from ep_plugin.checkpoint.config_keys import Keys, refusal
from ep_plugin.checkpoint.families import _config, _rows
from ep_plugin.checkpoint.family import Config, Family, Row
from ep_plugin.checkpoint.moe_layers import moe_layers
from ep_plugin.errors import ConfigError
from ep_plugin.untrusted import shown

_HF, _MEGATRON = "model.layers.{layer}.block_sparse_moe.", "decoder.layers.{layer}.mlp."
_EXPERT, _FC = _HF + "experts.{expert}.", _MEGATRON + "experts.experts.{expert}."
_H, _F = "hidden_size", "moe_ffn_hidden_size"
_TANH = ("gelu_pytorch_tanh", "geglu_tanh")  # what a Gemma with experts has, in either's words


def _read(config: Keys) -> dict[str, Any]:
    activation = _TANH[0] if config.get("hidden_act") == _TANH[0] else "silu"
    jitter = config.number("router_jitter_noise")
    if not 0 <= jitter < 1:
        raise refusal(config, "router_jitter_noise", "a number of at least 0 and below 1")
    return {
        **_config.dense_args(config, activation),
        **_config.window_args(config),
        **_config.experts_args(config, True, [1] * config["num_hidden_layers"]),
        "swiglu": activation == "silu",
        "ep_dense_activation": None if activation == "silu" else _TANH[1],
        "ffn_hidden_size": config["intermediate_size"],
        "moe_input_jitter_eps": jitter or None,
    }


def _to_config(args: argparse.Namespace) -> Config:
    if not all(moe_layers(args.moe_layer_freq, args.num_layers)):
        raise ConfigError(
            f"Mixtral has experts in every layer; moe_layer_freq is {args.moe_layer_freq}; use "
            "--layers all"
        )
    shared = _config.decoder_config(args) | _config.heads_config(args)
    shared["hidden_act"] = _hidden_act(args)
    jitter = getattr(args, "moe_input_jitter_eps", None)
    shared["router_jitter_noise"] = jitter or 0.0
    return shared | _config.window_config(args) | _config.experts_config(args)


def _hidden_act(args: argparse.Namespace) -> str:
    ours = getattr(args, "ep_dense_activation", None)
    if ours == _TANH[1]:
        return _TANH[0]
    if ours not in (None, "swiglu") or not (ours or args.swiglu):
        raise ConfigError(
            f"the checkpoint is no mixtral: ep_dense_activation = {shown(ours)} with swiglu = "
            f"{args.swiglu}; give a model with swiglu or {_TANH[1]}"
        )
    return "silu"


_FIXED = _config.moe_fixed(moe_router_pre_softmax=False)
FAMILY = Family(
    model_type="mixtral",
    moe=True,
    architecture="MixtralForCausalLM",
    rows=(
        *(_rows.EMBEDDING + _rows.ATTENTION + _rows.MOE_NORM),
        Row(_HF + "gate.weight", _MEGATRON + "router.weight", ("num_experts", _H)),
        Row(_EXPERT + "w1.weight", _FC + "linear_fc1.weight_w", (_F, _H)),
        Row(_EXPERT + "w3.weight", _FC + "linear_fc1.weight_v", (_F, _H)),
        Row(_EXPERT + "w2.weight", _FC + "linear_fc2.weight", (_H, _F)),
    ),
    fixed={k: v for k, v in _FIXED.items() if k not in ("swiglu", "ep_dense_activation")},
    fields=_config.FIELDS
    | {
        "intermediate_size": "moe_ffn_hidden_size",
        "num_local_experts": "num_experts",
        "num_experts_per_tok": "moe_router_topk",
    },
    read=_read,
    to_config=_to_config,
    defaults=_config.ROUTED
    | {"num_key_value_heads": 8, "rope_theta": 1e6, "router_jitter_noise": 0.0},
    balancing="of the model",
    jitters=True,
)
