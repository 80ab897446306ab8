"""Megatron's compiled helper of its data sets, from a wheel and in a checkout, on any device.

The wheel ships `helpers_cpp` compiled but not the Makefile it was made with; `compile_helpers`
runs `make` all the same and exits the process when that fails. A checkout has the Makefile and
nothing compiled: what `make` needs is looked for on every rank before one of them runs it.
"""

import importlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

from ep_plugin.errors import ConfigError
from ep_plugin.extras import pip_install
from ep_plugin.megatron.seams.patches import Patches

DATASETS = "megatron.core.datasets.utils"


def changes(patches: Patches) -> None:
    """Skip `compile_helpers` where the helpers are compiled and cannot be made; else do nothing."""
    if (_folder() / "Makefile").exists() or not is_compiled():
        return
    patches.replace(
        f"{DATASETS}:compile_helpers",
        lambda: None,
        "it runs `make` where a wheel has no Makefile, and ends the process when that fails",
    )


def is_compiled() -> bool:
    """Whether the helper can be imported."""
    return importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None


def check_helpers() -> None:
    """Raise ConfigError where Megatron would compile its helper and that would fail."""
    folder = _folder()
    if is_compiled() or not (folder / "Makefile").exists():
        return
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    if shutil.which("make") is None or shutil.which(os.environ.get("CXX", "g++")) is None:
        problem, remedy = "make and a C++ compiler", "apt-get install make g++"
    elif _says("python3", "-m", "pybind11", "--includes") is None:
        problem, remedy = "pybind11 of python3", pip_install("checkout")
    elif _says("python3-config", "--extension-suffix") != suffix:
        problem = "a python3-config of this Python"
        remedy = f"make -C {folder} LIBEXT={suffix}, once"
    else:
        return
    raise ConfigError(
        f"this Megatron-LM checkout compiles a helper in {folder}, for which {problem} must be "
        f"on PATH; use {remedy}"
    )


def _folder() -> Path:
    file = importlib.import_module(DATASETS).__file__
    assert file is not None
    return Path(file).parent


def _says(*command: str) -> str | None:
    """Return what a program prints; None where it fails or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
