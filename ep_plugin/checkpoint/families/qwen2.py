"""Qwen2: Llama, with biases on queries, keys and values."""

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
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    rows=_rows.EMBEDDING + _rows.ATTENTION + _rows.QKV_BIAS + _rows.DENSE,
    fixed=_config.FIXED | {"add_qkv_bias": True},
    fields=_config.DENSE_FIELDS,
    read=_read,
    to_config=_to_config,
    defaults=_config.DEFAULTS | {"num_key_value_heads": 32},
)
