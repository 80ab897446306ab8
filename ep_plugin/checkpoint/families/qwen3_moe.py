"""Qwen3-MoE: Qwen3 with experts in some layers, weights of the chosen ones summing to 1 or not."""

import argparse
from typing import Any

from ep_plugin.checkpoint.config_keys import Keys
from ep_plugin.checkpoint.families import _config, _qwen, _rows
from ep_plugin.checkpoint.family import Config, Family


def _read(config: Keys) -> dict[str, Any]:
    return _qwen.qwen_moe_args(config) | _config.heads_args(config)


def _to_config(args: argparse.Namespace) -> Config:
    return _qwen.qwen_moe_config(args) | _config.heads_config(args)


FAMILY = Family(
    model_type="qwen3_moe",
    moe=True,
    architecture="Qwen3MoeForCausalLM",
    rows=(
        *(_rows.EMBEDDING + _rows.ATTENTION + _rows.QK_NORM + _rows.DENSE + _rows.MOE_NORM),
        *(_rows.ROUTER, *_rows.EXPERTS),
    ),
    fixed=_config.moe_fixed(qk_layernorm=True, window_size=None),
    fields=_config.MOE_FIELDS,
    read=_read,
    to_config=_to_config,
    defaults=_qwen.DEFAULTS | {"num_key_value_heads": 4},
    balancing="of the model",
)
