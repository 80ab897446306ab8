"""Packages whose mere presence makes Megatron call kernels that only a GPU has.

Megatron takes them where they are installed, when it is imported: a norm, an optimizer, the norm of
gradients. In CPU mode they are hidden, so that it does what it does without them.
"""

import sys

from ep_plugin.errors import ConfigError
from ep_plugin.megatron.seams.patches import Patches

NAMES = (
    *("transformer_engine", "transformer_engine_torch", "apex", "amp_C"),
    *("fused_weight_gradient_mlp_cuda", "flash_attn", "flash_attn_3"),
)
WHY = "Megatron takes its kernels where it is installed, and they need a GPU"

_patches = Patches()  # the one piece of state: what is hidden in this process


def hide() -> None:
    """Hide them until `show_again`; a second call does nothing.

    Raises ConfigError where Megatron has been imported with one of them: it keeps what it took.
    """
    if _patches.active:
        return
    there = [name for name in NAMES if sys.modules.get(name) is not None]
    if there and "megatron.core" in sys.modules:
        raise ConfigError(
            f"Megatron was imported together with {' and '.join(there)}, whose kernels need a GPU, "
            "before CPU mode began; start the script with EP_PLUGIN_DEVICE=cpu python -m "
            "ep_plugin.run SCRIPT, or install the plugin before Megatron is imported"
        )
    changes(_patches)
    _patches.apply()


def changes(patches: Patches) -> None:
    """Note what `hide` changes."""
    for name in NAMES:
        patches.hide(name, WHY)


def show_again() -> list[str]:
    """Let them be imported again; does nothing where they are not hidden."""
    return _patches.undo()
