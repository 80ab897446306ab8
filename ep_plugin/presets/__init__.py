"""Published systems by name: one file per system, each with its routing explained.

A file exports `PRESETS`; a new file is picked up as it is.
"""

from importlib import import_module

from ep_plugin.errors import ConfigError, closest
from ep_plugin.presets._model import (
    LatentAttention,
    LayerParams,
    Model,
    Preset,
    active_params,
    layer_params,
    total_params,
)
from ep_plugin.registry import available
from ep_plugin.typed import typed
from ep_plugin.untrusted import shown

__all__ = [
    "LatentAttention",
    "LayerParams",
    "Model",
    "Preset",
    "active_params",
    "layer_params",
    "load",
    "presets",
    "total_params",
]


def presets() -> dict[str, Preset]:
    """Return every preset by its name, system by system."""
    modules = (import_module(f"ep_plugin.presets.{name}") for name in available("presets"))
    return {preset.name: preset for module in modules for preset in module.PRESETS}


@typed
def load(name: str) -> Preset:
    """Return a preset; raises ConfigError, with names close to it, for one that does not exist."""
    known = presets()
    if name not in known:
        near = closest(name, known)
        use = ", ".join(near) if len(near) < len(known) else "a name that `ep-plugin presets` lists"
        raise ConfigError(f"unknown preset {shown(name)}; use {use}")
    return known[name]
