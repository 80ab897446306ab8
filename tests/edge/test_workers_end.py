"""What a rank starts ends with it, also when it is killed; in every release of Megatron."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from releases import RELEASES, environment

pytestmark = pytest.mark.megatron
PATIENCE = 60  # seconds; they end within one
# A rank with a worker of every kind, Megatron's save workers among them; prints their ids.
RANK = """
import multiprocessing, os, sys, threading, time
from ep_plugin.megatron.seams import workers_end
from ep_plugin.megatron.seams.patches import Patches

def sleep(*_):
    time.sleep(1000)

def in_a_thread(pids):
    process = multiprocessing.get_context("fork").Process(target=sleep)
    process.start()
    pids.append(process.pid)

def main():
    patches = Patches()
    workers_end.changes(patches)
    if "without" not in sys.argv:
        patches.apply()
    pids, kept = [], []
    for method in ("fork", "spawn", "forkserver"):
        context = multiprocessing.get_context(method)
        for daemon in (True, False):
            kept.append(context.Process(target=sleep, daemon=daemon))
            kept[-1].start()
            pids.append(kept[-1].pid)
        kept.append(context.Manager())
        pids.append(kept[-1]._process.pid)
    thread = threading.Thread(target=in_a_thread, args=(pids,))
    thread.start()
    thread.join()
    if "megatron" in sys.argv:
        import torch, torch.distributed as dist
        from megatron.core.dist_checkpointing.strategies import async_utils, filesystem_async
        torch.cuda.current_device = lambda: "cpu"
        torch.cuda.synchronize = lambda: None
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        queue = async_utils.AsyncCallsQueue()
        queue.schedule_async_request(async_utils.AsyncRequest(sleep, (), []))
        names = ("get_write_results_queue", "_get_write_results_queue")  # and in 0.16
        found = [getattr(filesystem_async, n) for n in names if hasattr(filesystem_async, n)]
        kept.append(found[0]())
        pids += [process.pid for process in multiprocessing.active_children()]
    time.sleep(0.5)
    for process in multiprocessing.active_children():
        assert process.is_alive()
    print(*sorted(set(pids)), flush=True)
    time.sleep(1000)

if __name__ == "__main__":
    try:
        main()
    finally:
        os._exit(1)  # a failure waits for nobody
"""


def alive(pid: int) -> bool:
    """Whether the process runs; one that ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture
def started() -> Iterator[list[int]]:
    pids: list[int] = []
    yield pids
    for pid in filter(alive, pids):
        os.kill(pid, signal.SIGKILL)


def killed(folder: Path, release: str, pids: list[int], *words: str) -> None:
    """Start a rank, note its workers in `pids`, and kill it alone."""
    script = folder / "rank.py"
    script.write_text(RANK)
    command = [sys.executable, str(script), *words]
    with subprocess.Popen(
        command, env=environment(release), stdout=subprocess.PIPE, text=True
    ) as rank:
        try:
            assert rank.stdout is not None
            pids += map(int, rank.stdout.readline().split())
            assert len(pids) >= 10, "the rank ended"
            assert all(map(alive, pids))
        finally:
            rank.kill()


def ended(pids: list[int]) -> bool:
    deadline = time.monotonic() + PATIENCE
    while any(map(alive, pids)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


# Between these two Megatron starts its workers alike.
@pytest.mark.parametrize("release", [RELEASES[0], RELEASES[-1]])
def test_workers_end_with_a_rank_that_is_killed(
    release: str, tmp_path: Path, started: list[int]
) -> None:
    killed(tmp_path, release, started, "megatron")
    assert ended(started), [pid for pid in started if alive(pid)]


def test_without_it_they_stay(tmp_path: Path, started: list[int]) -> None:
    """What the seam is there for."""
    killed(tmp_path, RELEASES[-1], started, "without")
    time.sleep(1)
    assert sum(map(alive, started)) >= 6


# A rank that waits for a standing worker, which dies, ends after `close`, or with the rank.
WAITS = """
import multiprocessing, os, sys, time
from ep_plugin.megatron.seams import workers_end
from ep_plugin.megatron.seams.patches import Patches

class PersistentAsyncCaller:
    @staticmethod
    def async_loop(words):
        if words.get() == "die":
            os._exit(9)

    def close(self):
        words.put("done")
        process.join()

patches = Patches()
patches.wrap("multiprocessing.process:BaseProcess.start", workers_end._start, "as installed")
patches.wrap("__main__:PersistentAsyncCaller.close", workers_end._close, "as installed")
patches.apply()
context = multiprocessing.get_context("fork")
words = context.Queue()
process = context.Process(target=PersistentAsyncCaller.async_loop, args=(words,), daemon=True)
process.start()
if sys.argv[1] == "die":
    words.put("die")
    time.sleep(1000)
if sys.argv[1] == "close":
    PersistentAsyncCaller().close()
    time.sleep(0.5)
"""


@pytest.mark.parametrize(("how", "code"), [("die", 1), ("close", 0), ("leave", 0)])
def test_a_rank_does_not_wait_for_a_standing_worker_that_died(
    how: str, code: int, tmp_path: Path
) -> None:
    script = tmp_path / "rank.py"
    script.write_text(WAITS)
    done = subprocess.run(
        [sys.executable, str(script), how],
        env={**environment(RELEASES[-1]), "RANK": "5"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == code, done.stderr
    said = (
        "error: the process that writes checkpoints for rank 5 (--use-persistent-ckpt-worker) died"
    )
    assert (said in done.stderr) == bool(code), done.stderr
