"""Triton kernels launched with less work on the host.

At every launch Triton binds and specialises the arguments again. That takes the host longer than
many of these kernels run on the GPU. The result depends on few facts: a tensor's dtype and whether
it starts at a multiple of 16 bytes; whether an integer is 1, a multiple of 16, or wider than 32
bits. Here these facts are the key of a cache of compiled kernels.

Beside a launch it is small things that take the host's time: each argument, each view, and `len` of
a tensor, which is a function in Python and takes three times as long as its `shape[0]`.
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
        # What Triton compiled, its launcher and handles, and the constants in the kernel's order.
        self._compiled: dict[
            tuple[Any, ...], tuple[Any, Any, tuple[Any, Any], tuple[Any, ...]]
        ] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *args: Any, **settings: Any) -> None:
        device = torch.cuda.current_device()
        key = (device, *settings, *settings.values(), *_kinds(args))
        found = self._compiled.get(key)
        if found is None:
            compiled = self.kernel[grid](*args, **settings)
            constants = tuple(settings[name] for name in self.kernel.arg_names[len(args) :])
            handles = compiled.function, compiled.packed_metadata
            self._compiled[key] = compiled, compiled.run, handles, constants
            return
        compiled, run, handles, constants = found
        sizes = (*grid, 1, 1)[:3]
        hooks = triton.knobs.runtime
        if hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls:  # set by a profiler
            compiled[sizes](*args, *constants)
            return
        stream = triton.runtime.driver.active.get_current_stream(device)
        run(*sizes, stream, *handles, None, None, None, *args, *constants)


def _kinds(args: tuple[Any, ...]) -> list[Any]:
    """Return the facts about `args` that Triton specialises a kernel on: one entry for each.

    It runs at every launch, so the most frequent types come first and are told by identity.
    """
    kinds: list[Any] = []
    add = kinds.append
    for argument in args:
        kind = type(argument)
        if kind is int:
            # 1; else whether it is a multiple of 16, and whether it is wider than 32 bits.
            is_wide = not -0x80000000 <= argument < 0x80000000
            add(1 if argument == 1 else (2 if argument & 15 else 4) + is_wide)
        elif kind is Tensor or isinstance(argument, Tensor):
            dtype = argument.dtype
            add((dtype,) if argument.data_ptr() & 15 else dtype)  # the latter where aligned
        elif kind is TensorDescriptor:
            add((argument.base.dtype, *argument.block_shape))
        else:
            add(kind)
    return kinds


def jit(function: Callable[..., Any]) -> Any:
    """Compile `function`, a kernel launched from the host; a decorator like `triton.jit`."""
    kernel = triton.jit(function)
    return Kernel(kernel) if isinstance(kernel, triton.JITFunction) else kernel  # interpreter mode
