"""What a layer's host does on a GPU, on a CPU: the kernels' launches stand still and are counted.

Tensors say that they are on CUDA, so the layer takes the kernels and not their twins. A launch runs
the whole of `kernels._launch` but for Triton's launcher. Results are what memory held: only counts
and the host's time mean anything. Nothing may wait for a value.
"""

import pkgutil
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ep_plugin.moe import kernels
from ep_plugin.moe.kernels._launch import Kernel

# Neither a kernel of torch's nor a view: memory from the allocator's cache.
ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")


@dataclass
class Counts:
    """What was called, by name."""

    kernels: Counter[str] = field(default_factory=Counter)  # ours, and torch's products
    torch_kernels: Counter[str] = field(default_factory=Counter)  # torch's other work on the GPU
    made: Counter[str] = field(default_factory=Counter)  # tensors allocated, and views

    def numbers(self) -> tuple[int, int, int]:
        """Return how many kernels, kernels of torch's, allocations and views."""
        return self.kernels.total(), self.torch_kernels.total(), self.made.total()


class _Ops(TorchDispatchMode):
    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ALLOCATIONS or func.is_view:
            # How often torch detaches what this mode returns differs from release to release.
            self.counts.made[name] += name != "detach"
        else:
            self.counts.torch_kernels[name] += 1
        return func(*args, **(kwargs or {}))


class _Jit:
    """Stands for `triton.JITFunction` and for what it compiles."""

    function = packed_metadata = None

    def __init__(self, kernel: Any, counts: Counts) -> None:
        self.name, self.arg_names, self.counts = kernel.__name__, kernel.arg_names, counts

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **settings: Any) -> "_Jit":
            self.run()
            return self

        return launch

    def run(self, *args: Any) -> None:
        self.counts.kernels[self.name] += 1


class _Driver:
    """Stands for `triton.runtime.driver.active`."""

    def get_current_stream(self, device: int) -> int:
        return 0


def _kernels() -> list[Kernel]:
    """Return all kernels of the package."""
    names = [
        f"{kernels.__name__}.{module.name}" for module in pkgutil.iter_modules(kernels.__path__)
    ]
    values = [value for name in names for value in vars(import_module(name)).values()]
    return list({id(value): value for value in values if isinstance(value, Kernel)}.values())


@contextmanager
def fake_gpu() -> Iterator[Counts]:
    """Be on a GPU that computes nothing; yields the launches counted meanwhile."""
    counts = Counts()

    def grouped_mm(left: Tensor, right: Tensor, *, offs: Tensor) -> Tensor:
        counts.kernels["grouped_mm"] += 1
        if right.dim() == 3:
            return left.new_empty(left.shape[0], right.shape[2])
        return left.new_empty(offs.shape[0], left.shape[0], right.shape[1])

    def mm(left: Tensor, right: Tensor, out_dtype: torch.dtype) -> Tensor:
        counts.kernels["mm"] += 1
        return left.new_empty(left.shape[0], right.shape[1], dtype=out_dtype)

    with ExitStack() as stack:
        for kernel in _kernels():
            stack.enter_context(patch.object(kernel, "kernel", _Jit(kernel.kernel, counts)))
            stack.enter_context(patch.object(kernel, "_compiled", {}))
        for owner, name, value in (
            (torch.Tensor, "is_cuda", property(lambda tensor: True)),
            (torch.cuda, "current_device", lambda: 0),
            (torch.cuda, "is_current_stream_capturing", lambda: False),
            (triton.runtime.driver, "_active", _Driver()),
            (F, "grouped_mm", grouped_mm),
            (torch, "mm", mm),
        ):
            create = owner is torch.Tensor  # there it is inherited
            stack.enter_context(patch.object(owner, name, value, create=create))
        yield counts


@contextmanager
def counting(counts: Counts) -> Iterator[Counts]:
    """Count what is called inside, from 0, in `counts` of a `fake_gpu`."""
    for counter in (counts.kernels, counts.torch_kernels, counts.made):
        counter.clear()
    with _Ops(counts):
        yield counts
