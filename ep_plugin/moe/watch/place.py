"""Where this process is: iteration, layer and phase, kept in host memory and read after a fault.

A layer enters a phase with three stores of an integer: no sync, no device memory, no system call.
Once a watcher runs, the memory is shared with the other ranks of the host, so what a rank entered
last outlives it. The memory has no name: nothing is left behind, however a process ends.

    int64   iteration, moves, moves of layers, code, state, why, labels
    text    labels, 64 bytes each; code = label * 32 + phase

Standard library only.
"""

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from itertools import takewhile

SIZE, LABELS, LABEL = 1 << 16, 128, 64  # bytes; of all, before the labels, of a label
_PHASES = 32
_ITERATION, _MOVES, _LAYER_MOVES, _CODE, _STATE, _WHY, _COUNT = range(7)


class Phase(IntEnum):
    """What a process does; those with a backward of their own come first."""

    GATE = 0
    DISPATCH = 1
    EXPERTS = 2
    COMBINE = 3
    PAST = 4
    BACKWARD_OF_DISPATCH = 6
    BACKWARD_OF_EXPERTS = 7
    BACKWARD_OF_COMBINE = 8
    PAST_BACKWARD = 9
    SETUP = 10
    LOAD = 11
    DATA = 12
    STEP = 13
    OPTIMIZER = 14
    EVALUATION = 15
    SAVE = 16
    BETWEEN = 17
    FINISHED = 18


_BACKWARD = Phase.BACKWARD_OF_DISPATCH - Phase.DISPATCH
_LONG = (Phase.SETUP, Phase.LOAD, Phase.EVALUATION, Phase.SAVE)
_TEXTS = {
    Phase.GATE: "in the gate of {}",
    Phase.DISPATCH: "in dispatch of {}",
    Phase.EXPERTS: "in the experts of {}",
    Phase.COMBINE: "in combine of {}",
    Phase.PAST: "past {}",
    Phase.BACKWARD_OF_DISPATCH: "in backward of dispatch of {}",
    Phase.BACKWARD_OF_EXPERTS: "in backward of the experts of {}",
    Phase.BACKWARD_OF_COMBINE: "in backward of combine of {}",
    Phase.PAST_BACKWARD: "past the backward of {}",
    Phase.SETUP: "in the setup",
    Phase.LOAD: "loading a checkpoint",
    Phase.DATA: "waiting for data",
    Phase.STEP: "in forward or backward",
    Phase.OPTIMIZER: "in the optimizer step",
    Phase.EVALUATION: "in an evaluation",
    Phase.SAVE: "in a save",
    Phase.BETWEEN: "between two iterations",
    Phase.FINISHED: "past training",
}


class State(IntEnum):
    """How a process fares, as it says itself."""

    RUNNING = 0
    ENDED = 1
    FAILED = 2  # by an error of its own
    LOST = 3  # an exchange failed, which another rank may be to blame for


@dataclass(frozen=True)
class Seen:
    """A process's memory, read."""

    iteration: int
    moves: int
    layer_moves: int  # alike on ranks that run the same layers
    where: str
    finished: bool
    state: State
    why: str
    family: str  # the first layer: ranks of one pipeline stage have it in common
    is_long: bool = False  # in work that may take minutes without a move


class Place:
    """The memory of this process; one is enough, `here`."""

    def __init__(self) -> None:
        self._labels: list[str] = []
        self._numbers = memoryview(bytearray(SIZE)).cast("q")
        self.label("layer")
        self._numbers[_CODE] = Phase.SETUP

    def label(self, name: str) -> int:
        """Return the number of a layer's name; names above 1,000 share the first."""
        if name in self._labels:
            return self._labels.index(name)
        number, at = len(self._labels), LABELS + len(self._labels) * LABEL
        if at + LABEL > SIZE:
            return 0
        self._labels.append(name)
        text = name.encode(errors="replace")[:LABEL]
        self._numbers.cast("B")[at : at + LABEL] = text.ljust(LABEL, b"\0")
        self._numbers[_COUNT] = len(self._labels)
        return number

    @property
    def labels(self) -> int:
        return len(self._labels)

    def enter(self, phase: Phase) -> None:
        """Note that this process begins something outside the layers."""
        numbers = self._numbers
        numbers[_CODE] = phase
        numbers[_MOVES] += 1

    def enter_layer(self, code: int) -> None:
        numbers = self._numbers
        numbers[_CODE] = code
        numbers[_LAYER_MOVES] += 1

    def begin(self, iteration: int) -> None:
        """Note the iteration, from 1, that begins."""
        self._numbers[_ITERATION] = iteration

    @contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        """Be in a phase; what raises in it was last there."""
        after = Phase.FINISHED if self.code == Phase.FINISHED else Phase.BETWEEN
        self.enter(phase)
        yield
        self.enter(after)

    @property
    def code(self) -> int:
        """What was entered last; of a layer for `enter_layer`."""
        return self._numbers[_CODE]

    def fare(self, state: State, why: str = "") -> None:
        """Note that the process ends, and the kind of its error."""
        if why:
            self._numbers[_WHY] = self.label(why)
        self._numbers[_STATE] = state

    def seen(self) -> Seen:
        return read(self._numbers)

    def share(self) -> int:
        """Move into memory that other processes can map; return its file descriptor."""
        descriptor = os.memfd_create("ep_plugin-place")
        os.ftruncate(descriptor, SIZE)
        self._move(memoryview(mmap.mmap(descriptor, SIZE)))
        return descriptor

    def be_private(self) -> None:
        """Go on in memory of this process alone; a forked process must, and does."""
        self._move(memoryview(bytearray(SIZE)))

    def _move(self, memory: memoryview) -> None:
        memory[:] = self._numbers.cast("B")
        self._numbers = memory.cast("q")


class Layer:
    """The places of one layer, which has its number from its first call on."""

    def __init__(self) -> None:
        self.name = ""  # "": numbered in the order of first calls
        self._first = -1

    def enter(self, phase: Phase) -> None:
        if self._first < 0:
            name = self.name or f"MoE layer {here.labels}"
            self._first = here.label(name) * _PHASES
        here.enter_layer(self._first + phase)


def enter_backward(code: int) -> None:
    """Enter the backward of what `code` says was entered in the forward."""
    here.enter_layer(code + _BACKWARD if code % _PHASES < _BACKWARD else code)


def leave_backward(code: int) -> None:
    """Enter what follows the backward of an exchange."""
    phase = code % _PHASES
    if phase == Phase.COMBINE:
        enter_other(code, Phase.BACKWARD_OF_EXPERTS)
    elif phase == Phase.DISPATCH:
        enter_other(code, Phase.PAST_BACKWARD)


def enter_other(code: int, phase: Phase) -> None:
    """Enter another phase of the layer that `code` is of."""
    here.enter_layer(code - code % _PHASES + phase)


def read(numbers: memoryview) -> Seen:
    """Return what the memory of a process, `numbers` int64, says."""
    label, phase = divmod(numbers[_CODE], _PHASES)
    return Seen(
        iteration=numbers[_ITERATION],
        moves=numbers[_MOVES] + numbers[_LAYER_MOVES],
        layer_moves=numbers[_LAYER_MOVES],
        where=_TEXTS.get(Phase(phase), "").format(_label(numbers, label)),
        finished=phase == Phase.FINISHED,
        state=State(numbers[_STATE]),
        why=_label(numbers, numbers[_WHY]) if numbers[_WHY] else "",
        family=_label(numbers, 1),
        is_long=phase in _LONG,
    )


def _label(numbers: memoryview, number: int) -> str:
    at = LABELS + number * LABEL
    text = bytes(takewhile(bool, numbers.cast("B")[at : at + LABEL]))
    return text.decode(errors="replace")


here = Place()
os.register_at_fork(after_in_child=here.be_private)
