"""A fault on one rank: it is named, the run ends or goes on, and nothing is lost."""

import json
from dataclasses import replace
from pathlib import Path
from statistics import mean

import pytest
from fault import DRILLS, FAULTY, LAST, NO_FAULT, SAVES, Drill, Ended, said, train

pytestmark = [pytest.mark.megatron, pytest.mark.newest]
# Without it a run with experts on several ranks has two optimizers, one without has one.
RESHARDED = ("--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable")
MOST_MIB = 3.0  # per 1,000 iterations, over the last two thirds


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """The run without a fault."""
    ended = train(tmp_path_factory.mktemp("whole") / "run", replace(NO_FAULT, measures=True))
    assert ended.code == 0, ended.text[-3000:]
    assert [iteration for iteration, _ in ended.losses] == [*range(1, LAST + 1)]
    return ended


@pytest.mark.parametrize("drill", DRILLS, ids=lambda drill: drill.name)
def test_it_is_named_and_nothing_is_lost(drill: Drill, whole: Ended, tmp_path: Path) -> None:
    ended = train(tmp_path / "run", drill.fault, *drill.flags)
    assert said(drill, ended), ended.text[-6000:]
    assert ended.left == ()
    if drill.goes_on:
        assert ended.code == 0
        assert ended.losses == whole.losses
        return
    assert ended.code != 0
    assert ended.newest == SAVES
    resumed = train(tmp_path / "resumed", load=ended.saved)
    assert resumed.code == 0, resumed.text[-3000:]
    assert resumed.losses == whole.losses[SAVES:]
    assert resumed.left == ()


def test_a_run_leaves_nothing_behind(whole: Ended) -> None:
    assert whole.left == ()
    for rank in range(2):
        steps = left_by(whole, rank)
        assert len({(files, threads) for _, _, files, threads in steps[FAULTY - 1 :]}) == 1


def left_by(ended: Ended, rank: int) -> list[tuple[int, float, int, int]]:
    """Return iteration, MiB, files and threads after each step."""
    lines = (ended.folder / f"left.{rank}").read_text().splitlines()
    return [tuple(json.loads(line)) for line in lines]


def test_a_layout_that_changes_at_each_start_loses_nothing(whole: Ended, tmp_path: Path) -> None:
    cycle(whole, tmp_path, ranks=2, layouts=(2, 1))


@pytest.mark.long
def test_twenty_starts_at_changing_layouts_lose_nothing(tmp_path: Path) -> None:
    layouts = (2, 1, 4, 2, 4) * 4
    undisturbed = train(tmp_path / "whole", ranks=4, last=2 * len(layouts), saves=1000)
    cycle(undisturbed, tmp_path, ranks=4, layouts=layouts)


def cycle(undisturbed: Ended, folder: Path, ranks: int, layouts: tuple[int, ...]) -> None:
    """Train a share of the iterations in each layout, each from what the one before saved.

    The first is that of `undisturbed`: experts start from other values in another one.
    """
    last, load = undisturbed.losses[-1][0], None
    each, losses = last // len(layouts), []
    flags = (*RESHARDED, "--exit-interval", f"{each}")
    for number, ep in enumerate(layouts):
        where = folder / f"{number}"
        ended = train(where, NO_FAULT, *flags, ranks=ranks, ep=ep, last=last, saves=each, load=load)
        assert ended.code == 0, ended.text[-3000:]
        losses, load = [*losses, *ended.losses], ended.saved
    assert [iteration for iteration, _ in losses] == [*range(1, last + 1)]
    for loss, expected in zip(losses, undisturbed.losses, strict=True):
        assert loss[1] == pytest.approx(expected[1], rel=1e-5)


@pytest.mark.long
def test_two_thousand_iterations_are_flat(tmp_path: Path) -> None:
    ended = train(tmp_path / "run", replace(NO_FAULT, measures=True), last=2000, saves=500)
    assert ended.code == 0
    for rank in range(2):
        steps = left_by(ended, rank)[600:]
        first, last = steps[: len(steps) // 4], steps[-len(steps) // 4 :]
        grown = mean(mib for _, mib, _, _ in last) - mean(mib for _, mib, _, _ in first)
        assert grown / (last[0][0] - first[0][0]) * 1000 < MOST_MIB
        assert max(files for *_, files, _ in last) <= max(files for *_, files, _ in first)
        assert max(threads for *_, threads in last) <= max(threads for *_, threads in first)
