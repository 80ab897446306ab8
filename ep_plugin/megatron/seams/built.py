"""Whoever makes Megatron's MoE layer, and whenever its name was looked up, ours is what is made.

GPT layer specs look the class up when a spec is made. `hybrid_layer_specs` makes its specs when it
is imported, which may be before `install`; a script may have specs of its own. So it is asked when
a layer is built: Megatron's own becomes ours, and another class is an error. (`__new__` would be
the place; but what once had a `__new__` in Python refuses arguments when it is taken away.)
"""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

from ep_plugin.errors import ConfigError
from ep_plugin.megatron.seams.patches import Patches
from ep_plugin.megatron.seams.refusal import refuse

MOE_LAYER = "megatron.core.transformer.moe.moe_layer"


def changes(patches: Patches, layer_class: Any) -> None:
    """Let every MoE layer that is built be ours."""
    patches.wrap(
        f"{MOE_LAYER}:MoELayer.__init__",
        partial(_become_ours, layer_class),
        "a spec may hold Megatron's class since before the plugin; asked when a layer is built",
    )
    patches.wrap(
        f"{MOE_LAYER}:BaseMoELayer.__init__",
        partial(_check_ours, layer_class),
        "every MoE layer comes by here, of a class of the script's too",
    )


def _become_ours(
    layer_class: Any, original: Callable[..., None], layer: Any, *args: Any, **kwargs: Any
) -> None:
    if type(layer) is import_module(MOE_LAYER).MoELayer:
        layer.__class__ = layer_class
        layer_class.__init__(layer, *args, **kwargs)
        return
    _refuse_others(layer_class, type(layer))
    original(layer, *args, **kwargs)


def _check_ours(
    layer_class: Any, original: Callable[..., None], layer: Any, *args: Any, **kwargs: Any
) -> None:
    _refuse_others(layer_class, type(layer))
    original(layer, *args, **kwargs)


def _refuse_others(layer_class: Any, kind: type) -> None:
    """Raise ConfigError for a class that is not ours; a run with a command line ends."""
    if issubclass(kind, import_module("ep_plugin.megatron.block.adapter").EPMoELayer):
        return
    error = ConfigError(
        f"the model has an MoE layer of {kind.__module__}.{kind.__name__}, which is not the "
        "plugin's; use Megatron's MoELayer in its layer spec, or python SCRIPT without the plugin"
    )
    if layer_class.typed is None:
        raise error
    refuse(error)
