"""A correction for Megatron installed from its wheel, on any device.

The wheel ships `helpers_cpp` compiled but not the Makefile it was made with; `compile_helpers`
runs `make` all the same and exits the process when that fails.
"""

import importlib
import importlib.util
from pathlib import Path

from ep_plugin.megatron.seams.patches import Patches

DATASETS = "megatron.core.datasets.utils"


def changes(patches: Patches) -> None:
    """Skip `compile_helpers` where the helpers are compiled and cannot be made; else do nothing."""
    datasets = importlib.import_module(DATASETS)
    assert datasets.__file__ is not None
    has_makefile = (Path(datasets.__file__).parent / "Makefile").exists()
    compiled = importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None
    if has_makefile or not compiled:
        return
    patches.replace(
        f"{DATASETS}:compile_helpers",
        lambda: None,
        "it runs `make` where a wheel has no Makefile, and ends the process when that fails",
    )
