"""Classes and functions that a pickle may name: were their attributes changed?"""

import argparse
import collections
import pathlib
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata

from ep_plugin.checkpoint import tensors

OWNERS: tuple[Any, ...] = (
    argparse.Namespace,
    argparse.ArgumentParser,
    pathlib.Path,
    pathlib.PosixPath,
    torch._utils._rebuild_tensor_v2,
    torch._utils._rebuild_parameter,
    torch.serialization._get_layout,
    torch.storage.UntypedStorage,
    torch.storage.TypedStorage,
    filesystem._StorageInfo,
    *(one for one in vars(metadata).values() if isinstance(one, type)),
    *(one for one in vars(tensors).values() if isinstance(one, type)),
)
_MODULES = (torch, torch._utils, torch.serialization, argparse, collections, metadata, filesystem)


def state() -> list[tuple[Any, dict[str, Any]]]:
    """Return every owner with its attributes, as they are now."""
    found = [(owner, _attributes(owner)) for owner in OWNERS if hasattr(owner, "__dict__")]
    return [*found, *((module, dict(vars(module))) for module in _MODULES)]


def _attributes(owner: Any) -> dict[str, Any]:
    more = ("__code__", "__defaults__", "__kwdefaults__")
    return {**vars(owner), **{name: getattr(owner, name) for name in more if hasattr(owner, name)}}


def changes(before: list[tuple[Any, dict[str, Any]]]) -> list[str]:
    """Return what is other than `before`, and put it back."""
    found = []
    for owner, attributes in before:
        now = dict(vars(owner)) if isinstance(owner, type(torch)) else _attributes(owner)
        for name in {*attributes, *now}:
            if attributes.get(name, _GONE) is now.get(name, _GONE) or name in _LAZY:
                continue
            if isinstance(owner, type(torch)) and name not in attributes:
                continue  # a part of a package that was imported meanwhile
            found.append(f"{owner.__name__}.{name} was changed")
            _put_back(owner, name, attributes)
    return found


_GONE = object()
_LAZY = (
    "__slotnames__",
    "__annotations__",
    "__doc__",
    "__dict__",
    "__weakref__",
    "__abstractmethods__",
)


def _put_back(owner: Any, name: str, attributes: dict[str, Any]) -> None:
    if name in attributes:
        setattr(owner, name, attributes[name])
    elif hasattr(owner, name):
        delattr(owner, name)
