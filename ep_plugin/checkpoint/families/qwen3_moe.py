"""Qwen3-MoE: Qwen3 with experts in some layers, weights of the chosen ones summing to 1 or not."""

import argparse
from typing import Any

from ep_plugin.checkpoint.families import _config, _rows
from ep_plugin.checkpoint.family import Config, Family


def _to_args(config: Config) -> dict[str, Any]:
    return _config.qwen_moe_args(config) | _config.heads_args(config)


def _to_config(args: argparse.Namespace) -> Config:
    return _config.qwen_moe_config(args) | _config.heads_config(args)


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
    to_args=_to_args,
    to_config=_to_config,
    defaults=_config.DEFAULTS,
)
