"""Which software a rank runs: versions, the plugin's sources and Megatron's files."""

import hashlib
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ep_plugin import __version__
from ep_plugin.sources import hash_of, of_plugin

# Packages whose kernels a run may call, and what draws its samples. Those that are not installed
# must be so everywhere.
PACKAGES = {
    "Transformer Engine": ("transformer-engine", "transformer-engine-torch", "transformer_engine"),
    "Triton": ("triton",),
    "NumPy": ("numpy",),
    "flash-attn": ("flash-attn",),
    "DeepEP": ("deep-ep",),
    "DeepGEMM": ("deep-gemm",),
}


@cache
def versions() -> dict[str, str]:
    """Return what must be the same software on all ranks, by name."""
    core = sys.modules.get("megatron.core")
    found = {
        "Python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "torch": torch.__version__,
        "megatron-core": str(getattr(core, "__version__", "none")),
        "ep_plugin": __version__,
    }
    if torch.cuda.is_available() and torch.distributed.is_nccl_available():
        nccl: Any = torch.cuda.nccl
        found["NCCL"] = ".".join(map(str, nccl.version()))
    return found | {name: _version(names) for name, names in PACKAGES.items()}


@cache
def sources() -> dict[str, str]:
    """Return a hash of the plugin's sources, and one of the names and sizes of Megatron's."""
    found = {"the files of ep_plugin": of_plugin()}
    spec = find_spec("megatron.core")
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        root = Path(folder)
        parts = [part for part in (root, root.parent / "training") if part.is_dir()]
        found["the files of Megatron"] = " ".join(hash_of(p, content=False) for p in parts)
    return found


def device() -> str:
    """Return the name of the GPU; `CPU` without one."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def script() -> str:
    """Return a hash of the script that runs; `none` where Python runs no file."""
    main = Path(sys.argv[0]) if sys.argv and sys.argv[0] else None
    if main is None or not main.is_file():
        return "none"
    return hashlib.sha256(main.read_bytes()).hexdigest()[:12]


def _version(names: tuple[str, ...]) -> str:
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "none"
