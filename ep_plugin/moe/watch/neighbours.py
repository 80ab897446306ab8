"""The other ranks of this host: whether their processes live, and the memory of where they are.

A process maps a neighbour's memory once, through `/proc`; it stays readable when the neighbour is
dead. Only on Linux, and where ranks see each other's processes: elsewhere there are no neighbours,
and a rank is known by its words in the store alone.
"""

import mmap
import os
import socket
from dataclasses import dataclass
from pathlib import Path

from ep_plugin.moe.watch.blame import DIED, STOPPED, Known, fault_of
from ep_plugin.moe.watch.place import SIZE, Seen, State, read

HOST = socket.gethostname()


def space() -> str:
    """Return what processes have in common that see each other's numbers."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}".replace("/", "_")
    except OSError:
        return f"{HOST} alone {os.getpid()}"


@dataclass(frozen=True)
class Neighbour:
    """A rank whose process and memory this one can look at."""

    rank: int
    pid: int
    process: int  # file descriptor, readable once the process is gone
    numbers: memoryview

    def seen(self) -> Seen:
        return read(self.numbers)

    def known(self, gone: bool) -> Known:
        seen = self.seen()
        fault = fault_of(seen)
        if gone and seen.state is State.RUNNING:
            fault = DIED
        elif fault is None and not gone and _is_stopped(self.pid):
            fault = STOPPED
        return Known(self.rank, HOST, self.pid, seen, fault)

    def close(self) -> None:
        os.close(self.process)


def meet(rank: int, pid: int, descriptor: int) -> Neighbour | None:
    """Return the neighbour; None where it is gone already or cannot be looked at."""
    try:
        process = os.pidfd_open(pid)
    except OSError:
        return None
    try:
        with open(f"/proc/{pid}/fd/{descriptor}", "rb") as file:
            memory = mmap.mmap(file.fileno(), SIZE, access=mmap.ACCESS_READ)
    except (OSError, ValueError):
        os.close(process)
        return None
    return Neighbour(rank, pid, process, memoryview(memory).cast("q"))


def _is_stopped(pid: int) -> bool:
    """Whether a process is stopped by a signal or a debugger."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] in ("T", "t")
