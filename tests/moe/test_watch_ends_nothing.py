"""The watch ends no run, and is silent where nothing is wrong."""

import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from spawn import preload, run_ranks
from torch.distributed.distributed_c10d import PrefixStore

from ep_plugin.moe import watch
from ep_plugin.moe.watch import watcher as module
from ep_plugin.moe.watch.blame import sentence
from ep_plugin.moe.watch.neighbours import HOST, Neighbour
from ep_plugin.moe.watch.place import SIZE, Phase, State, here
from ep_plugin.moe.watch.post import Heard, first_line
from ep_plugin.moe.watch.watcher import Watcher

LIMIT = 60  # seconds for what takes less than two
OWNERS: dict[str, Any] = {"os": os, "thread": Thread, "store": PrefixStore}
LONG = (Phase.SAVE, Phase.LOAD, Phase.EVALUATION, Phase.SETUP)

preload("ep_plugin.moe.watch")


def wait_for(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def refuse(*_: object) -> Any:
    raise RuntimeError  # without words


def started_without(owner_name: str, name: str, folder: str) -> str:
    """Return what this rank says where the watch does not get what a function gives."""
    owner = OWNERS[owner_name]
    said = Path(folder) / f"said{dist.get_rank()}"
    descriptor = os.open(said, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    kept = os.dup(2)
    os.dup2(descriptor, 2)
    real = getattr(owner, name)
    setattr(owner, name, refuse)
    watch.start(2.0)
    if watch._watcher is not None:
        wait_for(lambda: watch._watcher is not None and not watch._watcher.post.is_alive())
    setattr(owner, name, real)
    dist.barrier()  # the run goes on
    watch.failed(RuntimeError("gloo"))
    watch.stop()
    os.dup2(kept, 2)
    return said.read_text()


@pytest.mark.parametrize(
    ("owner", "name", "told"),
    [
        ("os", "memfd_create", "ranks are not watched"),
        ("os", "eventfd", "ranks are not watched"),
        ("thread", "start", "ranks are not watched"),
        ("store", "clone", "connection of its own"),
    ],
)
def test_what_the_watch_does_not_get_ends_no_run_and_is_said_once(
    owner: str, name: str, told: str, tmp_path: Path
) -> None:
    said = "".join(run_ranks(2, started_without, owner, name, str(tmp_path)))
    assert said.count("\n") == said.count(told) == 1, said
    assert "RuntimeError" in said


@given(st.text(), st.sampled_from([RuntimeError, OSError, ValueError]))
def test_every_error_has_a_first_line(text: str, kind: type[Exception]) -> None:
    line = first_line(kind(text))
    assert line
    assert len(line.splitlines()) == 1


def restarted(folder: str) -> list[bool]:
    rank = dist.get_rank()
    watch.start(5.0)
    first = watch._watcher
    watch.start(5.0)
    same = watch._watcher is first
    dist.barrier()
    here.fare(State.LOST, "RuntimeError")  # which the restart is for
    dist.destroy_process_group()
    dist.init_process_group(store=dist.FileStore(f"{folder}/again", 2), rank=rank, world_size=2)
    watch.start(5.0)
    second = watch._watcher
    assert first is not None
    assert second is not None
    wait_for(lambda: [near.rank for near in second.post.neighbours] == [1 - rank])
    dist.barrier()
    running = here.seen().state is State.RUNNING
    watch.stop()
    return [same, second is not first, not first.is_alive(), running]


def test_a_restart_in_the_process_is_watched_anew(tmp_path: Path) -> None:
    assert run_ranks(2, restarted, str(tmp_path)) == [[True] * 4] * 2


@pytest.fixture
def watcher(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Rank 0 of two, whose thread does not run; `said` has its words."""
    found: Any = Watcher(dist.HashStore(), 0, 2, after=2.0, slow=100.0, keeper="the store")
    found.said = []
    monkeypatch.setattr(module, "say", found.said.append)
    yield found
    here.fare(State.RUNNING)
    here.enter(Phase.SETUP)
    os.close(found.post.descriptor)
    os.close(found._stopped)


@pytest.mark.parametrize(
    ("phase", "state"),
    [
        (Phase.FINISHED, State.RUNNING),
        (Phase.STEP, State.LOST),
        (Phase.STEP, State.FAILED),
        (Phase.FINISHED, State.ENDED),
    ],
)
def test_a_neighbour_that_is_gone_wakes_a_rank_past_training_once(
    phase: Phase, state: State, watcher: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with subprocess.Popen(["true"]) as process:
        gone = os.pidfd_open(process.pid)
    near = Neighbour(1, process.pid, gone, memoryview(bytearray(SIZE)).cast("q"))
    watcher.post.neighbours = [near]
    here.enter(phase)
    here.fare(state)
    waits = iter([False, True])
    monkeypatch.setattr(watcher, "_wait", lambda: next(waits))
    watcher.run()
    near.close()
    assert (watcher._told, watcher.said) == ({1}, [])


def words(watcher: Any, own: Phase, other: Phase, late: float, ago: float = 0.0) -> list[str]:
    """Return what rank 0 says after `late` seconds in `own`, rank 1 in `other`."""
    now = time.monotonic()
    here.enter(other)
    seen = replace(here.seen(), moves=7)
    watcher.post.heard[1] = Heard(1, "node1", 9, late, seen, time.time() - ago, now - ago)
    here.enter(own)
    watcher._moves, watcher._since = here.seen().moves, now - late
    watcher._look_at_time()
    said: list[str] = watcher.said
    return said


@pytest.mark.parametrize("phase", LONG)
def test_a_long_work_of_all_ranks_is_told_of_late_and_as_slow(phase: Phase, watcher: Any) -> None:
    for late in (3.0, 20.0, 50.0, 99.0):
        assert words(watcher, phase, phase, late) == []
    (text,) = words(watcher, phase, phase, 120.0)
    assert text.startswith("rank 0 has not moved for 120 s: that is slow, and no sign of a fault: ")
    assert len(words(watcher, phase, phase, 150.0)) == 1  # not until 240


@pytest.mark.parametrize(
    ("own", "other", "ago"),
    [
        (Phase.STEP, Phase.STEP, 0.0),
        (Phase.DATA, Phase.DATA, 0.0),
        (Phase.SAVE, Phase.EVALUATION, 0.0),
        (Phase.SAVE, Phase.STEP, 0.0),
        (Phase.SAVE, Phase.SAVE, 40.0),  # rank 1 has fallen silent
    ],
)
def test_anything_else_is_told_of_at_once(
    own: Phase, other: Phase, ago: float, watcher: Any
) -> None:
    (text,) = words(watcher, own, other, 50.0, ago)
    assert "slow" not in text


class Full:
    """A store with no room for one more connection."""

    def __init__(self, store: Any) -> None:
        self.store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    def clone(self) -> Any:
        raise RuntimeError("Connection refused")


def test_a_rank_without_a_connection_is_told_from_one_that_said_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ep_plugin.moe.watch.post.say", lambda text: None)
    store = dist.HashStore()
    first = Watcher(store, 0, 3, after=2.0, slow=100.0, keeper="the store")
    last = Watcher(Full(store), 2, 3, after=2.0, slow=100.0, keeper="the store")
    last.post.run()
    first.post._wanted = range(3)
    first.post._once()
    unknown = f"where rank 2 ({HOST}, pid {os.getpid()}) is, is not known: it got no connection"
    both = first._known(strangers=True)
    assert sentence(both).startswith("rank 1 has never been heard of; ")
    assert unknown not in sentence(both)  # whoever is at fault goes before
    text = sentence([known for known in both if known.rank != 1])
    assert text.startswith(f"{unknown} of its own to the rendezvous store (Connection refused); ")
    for one in (first, last):
        os.close(one.post.descriptor)
        os.close(one._stopped)
