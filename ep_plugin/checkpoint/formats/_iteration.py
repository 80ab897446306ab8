"""An iteration's folder: which one it is, and its pickles, loaded without trust.

A Megatron checkpoint keeps its arguments as a pickle that names classes of Megatron, which may not
be installed here; and a pickle may name anything at all, while an input file is not to be trusted.
So every name outside a short list becomes a stand-in class that only remembers how it was built;
`dist_writer.py` writes it back under its own name. `OpaquePickle` has the shape
`torch.load(pickle_module=...)` asks for.
"""

import argparse
import collections
import copyreg
import importlib
import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from ep_plugin.checkpoint.tensors import Damaged
from ep_plugin.errors import ConfigError

TRACKER = "latest_checkpointed_iteration.txt"
CONFIG = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}  # metadata.json
COMMON_STATE = "common_state/shard_0_1"  # run arguments and counters, where common.pt is not there
# What unpickling damaged bytes raises.
DAMAGE = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    ImportError,
    AttributeError,
    zipfile.BadZipFile,
)
_EXACT = {
    ("argparse", "Namespace"): argparse.Namespace,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
}
_TORCH_VALUES = (torch.dtype, torch.layout, torch.memory_format)


def iteration_folder(path: Path, is_iteration: Callable[[Path], bool]) -> Path:
    """Return the folder of one iteration; `path` is that, or what --save named.

    Raises ConfigError when it is neither.
    """
    if not path.is_dir():
        raise ConfigError(f"checkpoint {path} is not a folder; give the folder that --save named")
    tracker = path / TRACKER
    if not tracker.is_file():
        if is_iteration(path):
            return path
        raise ConfigError(
            f"{path} is not a checkpoint: it has neither {TRACKER} nor metadata.json; "
            "give the folder that --save named"
        )
    word = tracker.read_text(errors="replace").strip()
    if word != "release" and not word.isdecimal():
        raise ConfigError(f"{tracker} must hold an iteration number or 'release'; got {word!r}")
    folder = path / (word if word == "release" else f"iter_{int(word):07d}")
    if not folder.is_dir():
        raise ConfigError(
            f"{tracker} names {folder.name}, which {path} does not have; "
            "give one of its iteration folders instead"
        )
    return folder


def load_arguments(content: bytes, folder: Path) -> Any:
    """Return the run arguments of `folder` from their pickle; raises Damaged."""
    try:
        return torch.load(
            io.BytesIO(content), map_location="cpu", pickle_module=OpaquePickle, weights_only=False
        )
    except DAMAGE as error:
        raise Damaged(
            f"the run arguments in {folder} cannot be read ({error}); copy the checkpoint again"
        ) from error


def load_metadata(folder: Path) -> Metadata:
    """Return what `.metadata` says of the chunks in `folder`; raises Damaged."""
    path = folder / ".metadata"
    if not path.is_file():
        raise Damaged(f"{folder} has no .metadata: its save did not finish; give another one")
    try:
        with path.open("rb") as stream:
            metadata = OpaquePickle.Unpickler(stream).load()
    except DAMAGE as error:
        raise Damaged(f"{path} cannot be read ({error}); copy the checkpoint again") from error
    if not isinstance(metadata, Metadata):
        raise Damaged(
            f"{path} is no torch.distributed.checkpoint metadata; copy the checkpoint again"
        )
    return metadata


class Opaque:
    """An object of a class we do not import: how it was made, and its state.

    A pickle makes an object either by a call, cls(*arguments), or by cls.__new__(cls, *arguments).
    """

    arguments: tuple[Any, ...]
    called: bool
    state: Any

    def __new__(cls, *arguments: Any) -> "Opaque":
        opaque = super().__new__(cls)
        opaque.arguments, opaque.called, opaque.state = arguments, False, None
        return opaque

    def __init__(self, *_: Any) -> None:
        self.called = True

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __reduce_ex__(self, _: Any) -> tuple[Any, ...]:
        if self.called:
            return (type(self), self.arguments, self.state)
        return (copyreg.__newobj__, (type(self), *self.arguments), self.state)  # type: ignore[attr-defined]


def _known(module: str, name: str) -> Any:
    """Return the real object behind an allowed name, or None."""
    if (module, name) in _EXACT:
        return _EXACT[module, name]
    if module == "torch":
        value = getattr(torch, name, None)
        plain = isinstance(value, _TORCH_VALUES) or name == "Size" or name.endswith("Storage")
        return value if plain else None
    if module.startswith("torch.distributed.checkpoint"):
        value = getattr(importlib.import_module(module), name, None)
        return value if isinstance(value, type) else None
    return None


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        known = _known(module, name)
        if known is not None:
            return known
        return type(name, (Opaque,), {"__module__": module, "__qualname__": name})


class OpaquePickle:
    """The pickle module to hand to `torch.load`."""

    Unpickler = _Unpickler
