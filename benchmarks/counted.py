"""Count the bytes of tensors in a run on the CPU, as a GPU would hold them.

A kernel of ours counts by what it returns: what its twin in plain torch makes on the way is not
counted, since the kernel does not make it. Every other operation of torch counts by its results.
"""

import gc
import inspect
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ep_plugin.moe.kernels import _on_any, peers_torch


class Counted(TorchDispatchMode):
    """Bytes of the tensors that were made while this mode is on."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0  # bytes of those that are alive
        self.most = 0  # that were alive at one time
        self.shapes: set[torch.Size] = set()  # of all
        self._alive: dict[int, int] = {}
        self._in_twin = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self._in_twin:
            self._note(result, (args, kwargs))
        return result

    def twin(self, function: Any) -> Any:
        """Return `function`, a twin of a kernel, such that its results alone are counted."""

        def counting(*args: Any, **more: Any) -> Any:
            before, self._in_twin = self._in_twin, True
            try:
                result = function(*args, **more)
            finally:
                self._in_twin = before
            if not before:
                self._note(result, (args, more))
            return result

        return counting

    def _note(self, result: Any, given: Any) -> None:
        known = {_storage(tensor) for tensor in _tensors(given)}
        for tensor in _tensors(result):
            self.shapes.add(tensor.shape)
            key, storage = _storage(tensor), tensor.untyped_storage()
            if key in known or key in self._alive:
                continue
            self._alive[key] = storage.nbytes()
            self.now += storage.nbytes()
            weakref.finalize(storage, self._free, key)
        self.most = max(self.most, self.now)

    def _free(self, key: int) -> None:
        self.now -= self._alive.pop(key)


@contextmanager
def counted() -> Iterator[Counted]:
    """Count what is made inside.

    Python's collector is off meanwhile: what it frees, and when, differs from run to run.
    """
    mode = Counted()
    with ExitStack() as stack:
        if gc.isenabled():
            gc.disable()
            stack.callback(gc.enable)
        for module in (_on_any, peers_torch):
            for name, function in inspect.getmembers(module, inspect.isfunction):
                if not name.startswith("_"):
                    stack.enter_context(patch.object(module, name, mode.twin(function)))
        stack.enter_context(mode)
        yield mode


def _storage(tensor: Tensor) -> int:
    key: int = tensor.untyped_storage()._cdata
    return key


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in a value: in lists and dictionaries, and in records as of e4m3."""
    if isinstance(value, Tensor):
        yield value
        return
    if isinstance(value, dict):
        value = value.values()
    elif hasattr(value, "__dataclass_fields__"):
        value = vars(value).values()
    elif not isinstance(value, (list, tuple)):
        return
    for each in value:
        yield from _tensors(each)
