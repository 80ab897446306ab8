"""Triton kernels launched with less work on the host.

Triton binds and specialises the arguments of every launch anew, which takes the host longer than
many of these kernels take the GPU. What it would find depends on little: a tensor's dtype and
whether it starts at a multiple of 16 bytes, whether an integer is 1, a multiple of 16 or wide. That
little is looked up here, and the compiled kernel called.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


class Kernel:
    """A Triton kernel; call it as one: `kernel[grid](*arguments, **constants_and_options)`.

    All arguments that are no constants are positional, and constants come last.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel  # triton.JITFunction
        self._compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *args: Any, **settings: Any) -> None:
        key = (torch.cuda.current_device(), *settings.items(), *map(_kind, args))
        found = self._compiled.get(key)
        if found is None:
            compiled = self.kernel[grid](*args, **settings)
            constants = tuple(settings[name] for name in self.kernel.arg_names[len(args) :])
            self._compiled[key] = compiled, constants
            return
        compiled, constants = found
        compiled[(*grid, 1, 1)[:3]](*args, *constants)


def _kind(argument: Any) -> Any:
    """Return what Triton specialises on."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if type(argument) is int:
        return argument == 1, argument % 16 == 0, -(2**31) <= argument < 2**31
    if isinstance(argument, TensorDescriptor):
        return argument.base.dtype, *argument.block_shape
    return type(argument)


def jit(function: Callable[..., Any]) -> Any:
    """Compile `function`, a kernel that is launched from the host; a decorator as `triton.jit`."""
    kernel = triton.jit(function)
    return Kernel(kernel) if isinstance(kernel, triton.JITFunction) else kernel  # interpreted
