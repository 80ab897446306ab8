"""A pretrain script with one fault on one rank: DRILL, a `fault.Fault` as JSON, says which.

The fault comes when the rank enters a place (`ep_plugin.moe.watch.place`) in an iteration.
"""

import gc
import json
import os
import resource
import runpy
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from left import listening, own_sockets
from megatron.training import training

from ep_plugin.moe.experts.experts import Experts
from ep_plugin.moe.watch.place import Place, here

drill = json.loads(os.environ["DRILL"])
folder = Path(os.environ["DRILL_FOLDER"])
rank = int(os.environ["RANK"])


def note(name: str, text: str) -> None:
    with (folder / name).open("a") as file:
        file.write(f"{text}\n")


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_in_a_save() -> None:
    """Kill this process once the folder of the save is there."""
    saved = Path(sys.argv[sys.argv.index("--save") + 1], f"iter_{drill['iteration']:07d}")

    def wait() -> None:
        while not saved.exists():
            time.sleep(0.001)
        kill()

    threading.Thread(target=wait, daemon=True).start()


def stop() -> None:
    if os.fork() == 0:
        time.sleep(3)
        os.kill(os.getppid(), signal.SIGCONT)
        os._exit(0)
    os.kill(os.getpid(), signal.SIGSTOP)


def stop_for_good() -> None:
    time.sleep(2.5)  # where ranks do not see each other's memory, a text tells the place
    os.kill(os.getpid(), signal.SIGSTOP)


def fill_disk() -> None:
    """Let no file of this process, and of those it starts, grow beyond 4 KiB."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))


def nan() -> None:
    for experts in [part for part in gc.get_objects() if isinstance(part, Experts)]:
        for parameter in experts.parameters():
            parameter.data.view(-1)[5] = float("nan")


def end_data() -> None:
    from megatron.core.rerun_state_machine import RerunDataIterator

    for data in [part for part in gc.get_objects() if isinstance(part, RerunDataIterator)]:
        data.iterable = iter(())


FAULTS: dict[str, Callable[[], None]] = {
    "kill": kill,
    "kill_in_a_save": kill_in_a_save,
    "stop": stop,
    "stop_for_good": stop_for_good,
    "fill_disk": fill_disk,
    "nan": nan,
    "end_data": end_data,
}


def with_fault(real: Callable[..., None]) -> Callable[..., None]:
    def enter(place: Place, code: int) -> None:
        real(place, code)
        seen = place.seen()
        if (seen.iteration, seen.where) == (drill["iteration"], drill["where"]) and not done:
            done.append(True)
            if drill["kind"] in ("kill", "end_data"):
                time.sleep(2)  # a run of seconds: ranks look for each other once a second
            note("fault", str(time.time()))
            FAULTS[drill["kind"]]()

    return enter


def with_sockets(original: Callable[..., Any]) -> Callable[..., Any]:
    """Keep which sockets of this process listen, once ranks have met."""
    noted: list[str] = []

    def step(*rest: Any, **settings: Any) -> Any:
        result = original(*rest, **settings)
        if not noted:
            noted.extend(listening() & own_sockets())
            note("sockets", "\n".join(noted))
        return result

    return step


def with_measure(original: Callable[..., Any]) -> Callable[..., Any]:
    """Keep what a step leaves behind: resident MiB, open files, threads."""

    def step(*rest: Any, **settings: Any) -> Any:
        result = original(*rest, **settings)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        files, threads = len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
        mib = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
        note(f"left.{rank}", json.dumps([here.seen().iteration, mib, files, threads]))
        return result

    return step


done: list[bool] = []
if os.getsid(0) != os.getpid():  # some releases of torch start each rank in its own
    os.setsid()  # what this rank starts is found by its session
note("sessions", str(os.getsid(0)))
if rank == drill["rank"]:
    Place.enter = with_fault(Place.enter)  # type: ignore[method-assign]
    Place.enter_layer = with_fault(Place.enter_layer)  # type: ignore[method-assign]
training.train_step = with_sockets(training.train_step)
if drill["measures"]:
    training.train_step = with_measure(training.train_step)
runpy.run_path(sys.argv.pop(1), run_name="__main__")
