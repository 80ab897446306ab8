"""Packages whose mere presence makes Megatron call kernels that only a GPU has.

Megatron takes them where they are installed, when it is imported: a norm, an optimizer, the norm of
gradients. In CPU mode they are hidden, so that it does what it does without them.
"""

import sys
from importlib.machinery import PathFinder
from types import ModuleType
from typing import Any

from ep_plugin.errors import ConfigError
from ep_plugin.megatron.seams.patches import Patches

NAMES = (
    *("transformer_engine", "transformer_engine_torch", "apex", "amp_C"),
    *("fused_weight_gradient_mlp_cuda", "flash_attn", "flash_attn_3"),
)
WHY = "Megatron takes its kernels where it is installed, and they need a GPU"

_patches = Patches()  # the one piece of state: what is hidden in this process


def installed() -> list[str]:
    """Return which of them are on Python's path, hidden or not."""
    return [name for name in NAMES if PathFinder.find_spec(name) is not None]


def hide() -> None:
    """Hide them until `show_again`; a second call does nothing.

    Raises ConfigError where Megatron has been imported with one of them: it keeps what it took.
    """
    if _patches.active:
        return
    if there := _taken():
        raise ConfigError(
            f"Megatron was imported together with {' and '.join(there)}, whose kernels need a GPU, "
            "before CPU mode began; use EP_PLUGIN_DEVICE=cpu python -m ep_plugin.run SCRIPT, "
            "on several ranks torchrun FLAGS -m ep_plugin.run SCRIPT, also of an applied script; "
            "or call ep_plugin.megatron.install() before the first import of Megatron"
        )
    changes(_patches)
    _patches.apply()


def _taken() -> list[str]:
    """Return those that a module of Megatron has something of."""
    origins = {
        _package(value)
        for name, module in list(sys.modules.items())
        if name.partition(".")[0] == "megatron" and module is not None
        for value in list(vars(module).values())
    }
    return [name for name in NAMES if name in origins]


def _package(value: Any) -> str:
    """Return the package of a module, class or function; "" for any other value."""
    origin = getattr(value, "__name__" if isinstance(value, ModuleType) else "__module__", "")
    return origin.partition(".")[0] if isinstance(origin, str) else ""


def changes(patches: Patches) -> None:
    """Note what `hide` changes."""
    for name in NAMES:
        patches.hide(name, WHY)


def show_again() -> list[str]:
    """Let them be imported again; does nothing where they are not hidden."""
    return _patches.undo()
