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

from ep_plugin.megatron.seams import workers_end

pytestmark = [pytest.mark.megatron, pytest.mark.newest]  # its parameters are the releases
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


# A rank with a standing worker, and what becomes of both; `close` may not be ours to know.
STANDS = """
import multiprocessing, os, signal, sys, time
from ep_plugin.megatron.seams import workers_end
from ep_plugin.megatron.seams.patches import Patches

class PersistentAsyncCaller:
    @staticmethod
    def async_loop(words, answers):
        answers.put("ready")
        for word in iter(words.get, "done"):
            if word == "die":
                os._exit(9)
            answers.put(word)

    def __init__(self, method):
        context = multiprocessing.get_context(method)
        self.words, self.answers = context.Queue(), context.Queue()
        target, queues = PersistentAsyncCaller.async_loop, (self.words, self.answers)
        self.process = context.Process(target=target, args=queues, daemon=True)
        self.process.start()

    def close(self, abort=False):
        if abort:
            self.process.kill()
        else:
            self.words.put("done")
        self.process.join()

def main(how, method):
    patches = Patches()
    patches.wrap("multiprocessing.process:BaseProcess.start", workers_end._start, "as installed")
    if how == "close a failing one":
        patches.wrap("__main__:PersistentAsyncCaller.close", workers_end._close, "as installed")
    patches.apply()
    if how == "close a failing one":  # as one that fails when its modules are torn down
        worker = PersistentAsyncCaller.__new__(PersistentAsyncCaller)
        context = multiprocessing.get_context("fork")
        worker.words = context.Queue()
        fail = lambda: (worker.words.get(), os._exit(7))
        fail.__qualname__ = "PersistentAsyncCaller.async_loop"
        worker.process = context.Process(target=fail)
        worker.process.start()
        worker.close()
        time.sleep(0.5)
        return
    if how == "a signal":  # while it starts, as soon as it works, and the rank handles it
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.signal(signal.SIGINT, lambda *_: None)
    worker = PersistentAsyncCaller(method)
    if how == "a signal":
        os.killpg(0, signal.SIGTERM)
    assert worker.answers.get() == "ready"
    if how == "a signal":
        os.killpg(0, signal.SIGTERM)
        os.killpg(0, signal.SIGINT)
        worker.words.put("the last save")
        assert worker.answers.get() == "the last save"
    if how == "die":
        worker.words.put("die")
        time.sleep(1000)
    if how == "another dies":
        worker.close()
        PersistentAsyncCaller(method).words.put("die")
        time.sleep(1000)
    if how in ("close", "abort"):
        worker.close(how == "abort")
        time.sleep(0.5)

if __name__ == "__main__":
    main(*sys.argv[1:])
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize(
    ("how", "code"),
    [("die", 1), ("another dies", 1), ("close", 0), ("abort", 0), ("leave", 0), ("a signal", 0)],
)
def test_a_rank_ends_with_a_standing_worker_that_died_and_no_other(
    how: str, code: int, method: str, tmp_path: Path
) -> None:
    """torchrun sends its signals to the whole group, of which the rank handles them."""
    stands(tmp_path, code, how, method)


def test_a_worker_that_is_closed_may_end_as_it_likes(tmp_path: Path) -> None:
    stands(tmp_path, 0, "close a failing one", "fork")


def stands(folder: Path, code: int, *words: str) -> None:
    script = folder / "rank.py"
    script.write_text(STANDS)
    done = subprocess.run(
        [sys.executable, str(script), *words],
        env={**environment(RELEASES[-1]), "RANK": "5"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        start_new_session=True,
    )
    assert done.returncode == code, done.stderr
    said = (
        "error: the process that writes checkpoints for rank 5 (--use-persistent-ckpt-worker) died"
    )
    assert (said in done.stderr) == bool(code), done.stderr


def test_what_every_spawned_process_imports_is_light() -> None:
    """It is the module of what the process unpickles first."""
    code = (
        "import sys, ep_plugin.megatron.seams.with_parent as first\n"
        "print(*(name for name in sys.modules if name.startswith('ep_plugin.')), "
        "*({'torch', 'numpy', 'inspect'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert workers_end.EndsWithParent.__module__ == "ep_plugin.megatron.seams.with_parent"
    ours = {"ep_plugin.errors", "ep_plugin.megatron", "ep_plugin.megatron.seams"}
    assert set(done.stdout.split()) - ours == {workers_end.EndsWithParent.__module__}
