"""Rotary embeddings of config.json, in either spelling, and Megatron's arguments for them."""

import argparse
from typing import Any

from ep_plugin.checkpoint.config_keys import Keys, refusal
from ep_plugin.checkpoint.family import Config
from ep_plugin.errors import ConfigError
from ep_plugin.untrusted import shown

_LLAMA3 = {  # Megatron has these fixed
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_SPELLINGS = ("rope_scaling", "rope_parameters")
_KINDS = ("rope_type", "type")


def scaling(config: Keys) -> Keys:
    """Return the settings of rotary embeddings that stand in an object of their own.

    Raises ConfigError where both spellings are there and differ.
    """
    given = [key for key in _SPELLINGS if config.get(key)]
    if len(given) > 1 and config[given[0]] != config[given[1]]:
        raise ConfigError(
            f"config.json has rope_scaling = {shown(config['rope_scaling'])} and "
            f"rope_parameters = {shown(config['rope_parameters'])}; leave one of them out"
        )
    return config.within(given[0] if given else "rope_parameters")


def kind(settings: Keys) -> str:
    """Return the type of `scaling`. Raises ConfigError where two words for it differ."""
    found = [settings.get(key) for key in _KINDS if settings.get(key)]
    if any(value != found[0] for value in found):
        raise refusal(settings, "type", f"{shown(found[0])} in both rope_type and type")
    return str(found[0]) if found else "default"


def rope_args(config: Keys, *, yarn: bool = False) -> tuple[dict[str, Any], Keys]:
    """Return Megatron's arguments, and the object that scaling is in.

    With `yarn`, the caller reads that kind from the object. Raises ConfigError for what Megatron
    has no counterpart of.
    """
    settings = scaling(config)
    for keys in (config, settings):
        if keys.get("partial_rotary_factor", 1.0) != 1.0:
            raise refusal(keys, "partial_rotary_factor", "1.0")
    values: dict[str, Any] = {"rotary_base": _base(config, settings), "use_rope_scaling": False}
    found = kind(settings)
    if found == "llama3":
        for key, legal in _LLAMA3.items():
            default: Any = None
            if key.startswith("original"):
                default = config["max_position_embeddings"]
            if settings.get(key, default) != legal:
                raise refusal(settings, key, f"{legal}, which Megatron has fixed")
        factor = settings.number("factor")
        values |= {"use_rope_scaling": True, "rope_scaling_factor": factor}
    elif found != "default" and not (yarn and found == "yarn"):
        kinds = "default, llama3 or yarn" if yarn else "default or llama3"
        raise ConfigError(
            f"config.json has {settings.path('rope_type')} = {shown(found)}, and Megatron's GPT "
            f"has no counterpart for it in this family; give a model with {kinds}; if you mean the "
            f"model without scaling, leave nothing but rope_theta in {settings.path('')[:-1]}"
        )
    return values, settings


def rope_config(args: argparse.Namespace) -> Config:
    """Return what `rope_args` read."""
    values: Config = {"rope_theta": float(args.rotary_base)}
    if getattr(args, "use_rope_scaling", False):
        factor = float(args.rope_scaling_factor)
        values["rope_scaling"] = {"rope_type": "llama3", "factor": factor, **_LLAMA3}
    return values


def _base(config: Keys, settings: Keys) -> int:
    """Return the base of rotary embeddings; Megatron's is a whole number."""
    outer = config.get("rope_theta")  # transformers looks at the inner one first
    keys = settings if settings.get("rope_theta") or outer is None else config
    base = keys.number("rope_theta")
    if not 0 < base < float("inf") or base != int(base):
        raise refusal(keys, "rope_theta", "a positive whole number, as Megatron's --rotary-base is")
    return int(base)
