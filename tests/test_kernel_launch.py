"""Kernels are looked up by what Triton specialises on, and by nothing less."""

from typing import Any
from unittest.mock import patch

import pytest
import torch

pytest.importorskip("triton")
from ep_plugin.kernels._launch import Kernel

Launch = tuple[
    int, tuple[int, ...], tuple[Any, ...]
]  # number of what was compiled, grid, arguments


class FakeJit:
    """Stands for `triton.JITFunction`: compiles at every launch, and remembers launches."""

    arg_names = ("pointer", "length", "WIDTH", "FLAG")

    def __init__(self) -> None:
        self.compiled = 0
        self.launches: list[Launch] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **settings: Any) -> Any:
            self.compiled += 1
            return Compiled(self, self.compiled)

        return launch


class Compiled:
    def __init__(self, kernel: FakeJit, number: int) -> None:
        self.kernel, self.number = kernel, number

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args: self.kernel.launches.append((self.number, grid, args))


def test_a_kernel_is_compiled_once_for_all_that_is_alike() -> None:
    fake, memory = FakeJit(), torch.zeros(64)
    kernel = Kernel(fake)

    def launch(pointer: torch.Tensor, length: int, width: int = 8, warps: int = 4) -> int:
        kernel[(5,)](pointer, length, FLAG=True, WIDTH=width, num_warps=warps)
        return fake.compiled

    with patch.object(torch.cuda, "current_device", lambda: 0):
        assert launch(memory, 32) == 1
        assert launch(torch.ones(3), 48) == 1  # another tensor, another multiple of 16
        assert fake.launches[-1][:2] == (1, (5, 1, 1))
        assert fake.launches[-1][2][1:] == (48, 8, True)  # constants in the kernel's order
        assert launch(memory[1:], 32) == 2  # not aligned
        assert launch(memory.int(), 32) == 3
        assert launch(memory, 33) == 4
        assert launch(memory, 1) == 5
        assert launch(memory, 2**40) == 6
        assert launch(memory, 32, width=16) == 7
        assert launch(memory, 32, warps=8) == 8
        assert launch(memory, 64) == 8
        assert fake.launches[-1][0] == 1
    with patch.object(torch.cuda, "current_device", lambda: 1):
        assert launch(memory, 32) == 9
