"""A correction for Megatron installed from its wheel, on any device.

The wheel ships `helpers_cpp` compiled but not the Makefile it was made with; `compile_helpers`
runs `make` all the same and exits the process when that fails.
"""

import importlib
import importlib.util
from pathlib import Path

DATASETS = "megatron.core.datasets.utils"


def without_compilation() -> None:
    """Skip `compile_helpers` where the helpers are compiled and cannot be made; else do nothing."""
    datasets = importlib.import_module(DATASETS)
    assert datasets.__file__ is not None
    has_makefile = (Path(datasets.__file__).parent / "Makefile").exists()
    compiled = importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None
    original = datasets.compile_helpers
    if has_makefile or not compiled or hasattr(original, "ep_original"):
        return

    def compile_helpers() -> None:
        """Nothing to do: the helpers are there."""

    compile_helpers.ep_original = original  # type: ignore[attr-defined]
    datasets.compile_helpers = compile_helpers  # type: ignore[attr-defined]


def with_compilation() -> None:
    """Take `without_compilation` back; does nothing without it."""
    datasets = importlib.import_module(DATASETS)
    original = getattr(datasets.compile_helpers, "ep_original", None)
    if original is not None:
        datasets.compile_helpers = original  # type: ignore[attr-defined]
