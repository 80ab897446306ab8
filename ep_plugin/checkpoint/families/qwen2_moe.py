"""Qwen2-MoE: Qwen2 with experts in some layers and a shared expert behind a gate of its own."""

import argparse
from typing import Any

from ep_plugin.checkpoint.config_keys import Keys
from ep_plugin.checkpoint.families import _config, _qwen, _rows
from ep_plugin.checkpoint.family import Config, Family, Row

_HF, _MEGATRON = "model.layers.{layer}.mlp.", "decoder.layers.{layer}.mlp."


def _read(config: Keys) -> dict[str, Any]:
    _config.refuse(config, "qkv_bias", True)
    return _qwen.qwen_moe_args(config) | _config.heads_args(config)


def _to_config(args: argparse.Namespace) -> Config:
    return _qwen.qwen_moe_config(args) | _config.heads_config(args)


FAMILY = Family(
    model_type="qwen2_moe",
    moe=True,
    architecture="Qwen2MoeForCausalLM",
    rows=(
        *(_rows.EMBEDDING + _rows.ATTENTION + _rows.QKV_BIAS + _rows.DENSE + _rows.MOE_NORM),
        *(_rows.ROUTER, *_rows.EXPERTS),
        *_rows.feed_forward("mlp.shared_expert.", "mlp.shared_experts.", _rows.SHARED, "moe"),
        Row(
            _HF + "shared_expert_gate.weight",
            _MEGATRON + "shared_experts.gate_weight",
            ("1", "hidden_size"),
            layers="moe",
        ),
    ),
    fixed=_config.with_shared_expert(
        add_qkv_bias=True, window_size=None, moe_shared_expert_gate=True
    ),
    fields=_config.MOE_FIELDS
    | {"shared_expert_intermediate_size": "moe_shared_expert_intermediate_size"},
    read=_read,
    to_config=_to_config,
    defaults=_qwen.DEFAULTS | {"num_key_value_heads": 16},
    balancing="of the model",
)
