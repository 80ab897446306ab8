"""Qwen3: Llama, with a norm over each head of queries and keys."""

import argparse
from typing import Any

from ep_plugin.checkpoint.families import _config, _rows
from ep_plugin.checkpoint.family import Config, Family


def _to_args(config: Config) -> dict[str, Any]:
    _config.refuse(config, "use_sliding_window", False)
    return _config.decoder_args(config) | _config.heads_args(config)


def _to_config(args: argparse.Namespace) -> Config:
    shared = _config.decoder_config(args) | _config.heads_config(args)
    return shared | {"use_sliding_window": False}


FAMILY = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    rows=_rows.EMBEDDING + _rows.ATTENTION + _rows.QK_NORM + _rows.DENSE,
    fixed=_config.FIXED | {"qk_layernorm": True},
    fields=_config.DENSE_FIELDS,
    to_args=_to_args,
    to_config=_to_config,
    defaults=_config.DEFAULTS,
)
