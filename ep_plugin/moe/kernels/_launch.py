"""Triton kernels launched with less work on the host.

At every launch Triton binds and specialises the arguments again. That takes the host longer than
many of these kernels run on the GPU. The result depends on few facts: a tensor's dtype and whether
it starts at a multiple of 16 bytes; whether an integer is 1, a multiple of 16, or wider than 32
bits. Here these facts are the key of a cache of compiled kernels.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


# Triton has both functions too, but they also work inside kernels and cost the host 4 us a call.
def cdiv(number: int, by: int) -> int:
    """Return `number` / `by`, rounded up."""
    return -(-number // by)


def next_power_of_2(number: int) -> int:
    """Return the least power of two that is at least `number`, which is 1 or more."""
    return 1 << (number - 1).bit_length()


class Kernel:
    """A Triton kernel, launched as usual: `kernel[grid](*arguments, **constants_and_options)`.

    Arguments are positional. Constants (`tl.constexpr`) are given by name, and the kernel's
    signature lists them last.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel  # triton.JITFunction
        self._compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *args: Any, **settings: Any) -> None:
        device = torch.cuda.current_device()
        key = (device, *settings, *settings.values(), *_kinds(args))
        found = self._compiled.get(key)
        if found is None:
            compiled = self.kernel[grid](*args, **settings)
            constants = tuple(settings[name] for name in self.kernel.arg_names[len(args) :])
            self._compiled[key] = compiled, constants
            return
        compiled, constants = found
        sizes = (*grid, 1, 1)[:3]
        hooks = triton.knobs.runtime
        if hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls:  # set by a profiler
            compiled[sizes](*args, *constants)
            return
        stream = triton.runtime.driver.active.get_current_stream(device)
        handles = compiled.function, compiled.packed_metadata
        compiled.run(*sizes, stream, *handles, None, None, None, *args, *constants)


def _kinds(args: tuple[Any, ...]) -> list[Any]:
    """Return the facts about `args` that Triton specialises a kernel on."""
    kinds: list[Any] = []
    for argument in args:
        if isinstance(argument, Tensor):
            kinds += argument.dtype, argument.data_ptr() % 16 == 0
        elif type(argument) is int:
            kinds += argument == 1, argument % 16 == 0, argument.bit_length() < 32
        elif isinstance(argument, TensorDescriptor):
            kinds += argument.base.dtype, *argument.block_shape
        else:
            kinds.append(type(argument))
    return kinds


def jit(function: Callable[..., Any]) -> Any:
    """Compile `function`, a kernel launched from the host; a decorator like `triton.jit`."""
    kernel = triton.jit(function)
    return Kernel(kernel) if isinstance(kernel, triton.JITFunction) else kernel  # interpreter mode
