"""Wrappers that shard a whole model's parameters are refused for a model with our experts.

Where flags are parsed, the table of Megatron's settings refuses them first; a loop of one's own
chooses its wrapper without a flag. Asked before a wrapper makes a mesh or sends anything.
"""

import inspect
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

from ep_plugin.errors import ConfigError
from ep_plugin.megatron.arguments.theirs_table import MEGATRON_FSDP, TORCH_FSDP
from ep_plugin.megatron.seams.patches import Patches
from ep_plugin.megatron.seams.refusal import refuse


def changes(patches: Patches, layer_class: Any, wrappers: tuple[str, ...]) -> None:
    """Let each of `wrappers`, constructors that take a `module`, look for our blocks in it."""
    for place in wrappers:
        patches.wrap(
            place,
            partial(_refuse_ours, layer_class),
            "a loop of one's own may shard a model's parameters, which our experts do not bear",
        )


def _refuse_ours(
    layer_class: Any, original: Callable[..., None], wrapper: Any, *args: Any, **kwargs: Any
) -> None:
    """Raise ConfigError for a module with a block of ours; a run with a command line ends."""
    given = inspect.signature(original).bind(wrapper, *args, **kwargs).arguments
    ours = import_module("ep_plugin.megatron.block.adapter").EPMoELayer
    if any(isinstance(part, ours) for part in given["module"].modules()):
        name = type(wrapper).__name__
        why = TORCH_FSDP if name.startswith("Torch") else MEGATRON_FSDP
        reason = why.partition("; use ")[0]
        error = ConfigError(f"{name} {reason}; use Megatron's DistributedDataParallel")
        if layer_class.typed is None:
            raise error
        refuse(error)
    original(wrapper, *args, **kwargs)
