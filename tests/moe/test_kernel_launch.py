"""Kernels are looked up by what Triton specialises on, and by nothing less."""

from typing import Any
from unittest.mock import patch

import pytest
import torch

pytest.importorskip("triton")
import triton

from ep_plugin.moe.kernels._launch import Kernel, cdiv, next_power_of_2

Launch = tuple[
    int, tuple[int, ...], tuple[Any, ...]
]  # number of what was compiled, grid, arguments


class FakeJit:
    """Stands for `triton.JITFunction`: compiles at every launch, and remembers launches."""

    arg_names = ("pointer", "length", "WIDTH", "FLAG")

    def __init__(self) -> None:
        self.compiled = self.hooked = 0
        self.launches: list[Launch] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **settings: Any) -> Any:
            self.compiled += 1
            return Compiled(self, self.compiled)

        return launch


class Compiled:
    """Stands for a compiled kernel: launched as Triton does for its hooks, or run without them."""

    function, packed_metadata = "function", "metadata"

    def __init__(self, kernel: FakeJit, number: int) -> None:
        self.kernel, self.number = kernel, number

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.kernel.hooked += 1
        return lambda *args: self.kernel.launches.append((self.number, grid, args))

    def run(self, x: int, y: int, z: int, stream: int, function: str, *args: Any) -> None:
        assert (stream, function, args[0]) == (7, "function", "metadata")
        assert args[1:4] == (None, None, None)  # no metadata for hooks, no hooks
        self.kernel.launches.append((self.number, (x, y, z), args[4:]))


class FakeDriver:
    """Stands for `triton.runtime.driver.active`."""

    def get_current_stream(self, device: int) -> int:
        return 7


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(triton.runtime.driver, "_active", FakeDriver())


@pytest.mark.usefixtures("on_a_gpu")
def test_a_kernel_is_compiled_once_for_all_that_is_alike() -> None:
    fake, memory = FakeJit(), torch.zeros(64)
    kernel = Kernel(fake)

    def launch(pointer: torch.Tensor, length: int, width: int = 8, warps: int = 4) -> int:
        kernel[(5,)](pointer, length, FLAG=True, WIDTH=width, num_warps=warps)
        return fake.compiled

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


@pytest.mark.usefixtures("on_a_gpu")
def test_profilers_see_launches() -> None:
    fake, memory = FakeJit(), torch.zeros(64)
    kernel = Kernel(fake)

    def launch() -> None:
        kernel[2, 3](memory, 32, WIDTH=8, FLAG=True)

    launch()
    launch()
    assert (len(fake.launches), fake.hooked) == (1, 0)
    for hooks in (triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook):
        hooks.add(print)
        try:
            launch()
        finally:
            hooks.remove(print)
    assert (len(fake.launches), fake.hooked, fake.compiled) == (3, 2, 1)
    assert len(set(map(repr, fake.launches))) == 1


def test_sizes_are_those_of_triton() -> None:
    for number in range(1, 70):
        assert next_power_of_2(number) == triton.next_power_of_2(number)
        assert cdiv(number, 8) == triton.cdiv(number, 8)
    assert cdiv(0, 8) == 0
