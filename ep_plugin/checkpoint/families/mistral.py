"""Mistral: Llama, with attention that may be limited to a window of tokens."""

import argparse
from typing import Any

from ep_plugin.checkpoint.families import _config, _rows
from ep_plugin.checkpoint.family import Config, Family


def _to_args(config: Config) -> dict[str, Any]:
    return _config.decoder_args(config) | _config.heads_args(config) | _config.window_args(config)


def _to_config(args: argparse.Namespace) -> Config:
    shared = _config.decoder_config(args) | _config.heads_config(args)
    return shared | _config.window_config(args)


FAMILY = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    rows=_rows.EMBEDDING + _rows.ATTENTION + _rows.DENSE,
    fixed=_config.without_window(),
    fields=_config.DENSE_FIELDS,
    to_args=_to_args,
    to_config=_to_config,
    defaults=_config.DEFAULTS,
)
