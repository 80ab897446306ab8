"""What many starts and many iterations leave behind: losses, memory, open files, threads."""

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

from fault import NO_FAULT, Ended, train

# Of the long run, from save to save, and at its start: the first save opens files that stay.
ITERATIONS, SAVES, SKIPPED = 2000, 500, 600
# Ranks and EP of each start. The first is that of the undisturbed run: experts start from other
# values in another layout.
LAYOUTS = ((2, 2), (1, 1), (4, 4), (2, 1), (4, 2)) * 4
# Without it a run with experts on several ranks has two optimizers, one without has one.
RESHARDED = ("--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable")


@dataclass(frozen=True)
class Cycled:
    """Runs that each go on from the one before, beside one that never stopped."""

    starts: int
    iterations: int
    apart: float  # the largest relative difference of a loss
    left: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class Steady:
    """What a run of many iterations grows by, on the rank that grows most."""

    iterations: int
    saves: int
    skipped: int  # at the start
    mib: float  # resident memory, per 1,000 iterations
    files: int
    threads: int
    left: tuple[str, ...]
    seconds: float


def cycles(undisturbed: Ended, folder: Path, layouts: tuple[tuple[int, int], ...]) -> Cycled:
    """Train a share of the iterations in each layout, each from what the one before saved."""
    begin = time.monotonic()
    last, load, left = undisturbed.losses[-1][0], None, undisturbed.left
    each, losses = last // len(layouts), []
    flags = (*RESHARDED, "--exit-interval", f"{each}")
    for number, (ranks, ep) in enumerate(layouts):
        where = folder / f"{number}"
        ended = train(where, NO_FAULT, *flags, ranks=ranks, ep=ep, last=last, saves=each, load=load)
        assert ended.code == 0, ended.text[-3000:]
        losses, load, left = [*losses, *ended.losses], ended.saved, left + ended.left
    assert [iteration for iteration, _ in losses] == [*range(1, last + 1)]
    pairs = zip(losses, undisturbed.losses, strict=True)
    apart = max(abs(loss / expected - 1) for (_, loss), (_, expected) in pairs)
    return Cycled(len(layouts), last, apart, left, round(time.monotonic() - begin, 1))


def twenty_cycles(folder: Path, layouts: tuple[tuple[int, int], ...] = LAYOUTS) -> Cycled:
    """Save and resume in each layout; two iterations in between."""
    ranks, ep = layouts[0]
    undisturbed = train(folder / "whole", ranks=ranks, ep=ep, last=2 * len(layouts), saves=1000)
    assert undisturbed.code == 0, undisturbed.text[-3000:]
    return cycles(undisturbed, folder, layouts)


def steady(folder: Path, iterations: int = ITERATIONS, skipped: int = SKIPPED) -> Steady:
    """Run without a fault, with saves in between."""
    begin = time.monotonic()
    ended = train(folder, replace(NO_FAULT, measures=True), last=iterations, saves=SAVES)
    assert ended.code == 0, ended.text[-3000:]
    grown = [_growth(left_by(ended, rank)[skipped:]) for rank in range(2)]
    mib, files, threads = (max(values) for values in zip(*grown, strict=True))
    seconds = round(time.monotonic() - begin, 1)
    return Steady(
        iterations=iterations,
        saves=iterations // SAVES,
        skipped=skipped,
        mib=round(mib, 3),
        files=int(files),
        threads=int(threads),
        left=ended.left,
        seconds=seconds,
    )


def left_by(ended: Ended, rank: int) -> list[tuple[int, float, int, int]]:
    """Return iteration, MiB, files and threads after each step."""
    lines = (ended.folder / f"left.{rank}").read_text().splitlines()
    return [tuple(json.loads(line)) for line in lines]


def _growth(steps: list[tuple[int, float, int, int]]) -> tuple[float, int, int]:
    """Return by what the last quarter is above the first: MiB per 1,000 iterations, the others."""
    first, last = steps[: len(steps) // 4], steps[-len(steps) // 4 :]
    mib = mean(mib for _, mib, _, _ in last) - mean(mib for _, mib, _, _ in first)
    files, threads = (
        max(step[place] for step in last) - max(step[place] for step in first) for place in (2, 3)
    )
    return mib / (last[0][0] - first[0][0]) * 1000, files, threads
