"""Mistral: Llama, with attention that may be limited to a window of tokens."""

import argparse
from typing import Any

from ep_plugin.checkpoint.config_keys import Keys, refusal
from ep_plugin.checkpoint.families import _config, _rows
from ep_plugin.checkpoint.family import Config, Family


def _read(config: Keys) -> dict[str, Any]:
    window = _config.window_args(config)
    legal = "full_attention" if window["window_size"] is None else "sliding_attention"
    if any(kind != legal for kind in config.listing("layer_types")):
        raise refusal(config, "layer_types", f"{legal} in every layer")
    return _config.dense_args(config) | window


def _to_config(args: argparse.Namespace) -> Config:
    shared = _config.decoder_config(args) | _config.heads_config(args)
    return shared | _config.window_config(args)


FAMILY = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    rows=_rows.EMBEDDING + _rows.ATTENTION + _rows.DENSE,
    fixed=_config.without_window(),
    fields=_config.DENSE_FIELDS,
    read=_read,
    to_config=_to_config,
    defaults={**_config.DEFAULTS, "num_key_value_heads": 8, "sliding_window": 4096},
)
