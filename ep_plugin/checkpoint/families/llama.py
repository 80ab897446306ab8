"""Llama: the decoder that the other families are told apart from."""

import argparse
from typing import Any

from ep_plugin.checkpoint.config_keys import Keys
from ep_plugin.checkpoint.families import _config, _rows
from ep_plugin.checkpoint.family import Config, Family


def _read(config: Keys) -> dict[str, Any]:
    return _config.dense_args(config)


def _to_config(args: argparse.Namespace) -> Config:
    return _config.decoder_config(args) | _config.heads_config(args)


FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    rows=_rows.EMBEDDING + _rows.ATTENTION + _rows.DENSE,
    fixed=_config.FIXED,
    fields=_config.DENSE_FIELDS,
    read=_read,
    to_config=_to_config,
    defaults=_config.DEFAULTS,
)
