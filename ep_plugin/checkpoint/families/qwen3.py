"""Qwen3: Llama, with a norm over each head of queries and keys."""

import argparse
from typing import Any

from ep_plugin.checkpoint.config_keys import Keys
from ep_plugin.checkpoint.families import _config, _qwen, _rows
from ep_plugin.checkpoint.family import Config, Family


def _read(config: Keys) -> dict[str, Any]:
    _qwen.no_window(config)
    return _config.dense_args(config)


def _to_config(args: argparse.Namespace) -> Config:
    shared = _config.decoder_config(args) | _config.heads_config(args)
    return shared | {"use_sliding_window": False}


FAMILY = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    rows=_rows.EMBEDDING + _rows.ATTENTION + _rows.QK_NORM + _rows.DENSE,
    fixed=_config.FIXED | {"qk_layernorm": True},
    fields=_config.DENSE_FIELDS,
    read=_read,
    to_config=_to_config,
    defaults=_config.DEFAULTS | {"head_dim": 128, "num_key_value_heads": 32},
)
