"""What a run leaves behind: processes, sockets that listen, shared memory."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

SHARED = Path("/dev/shm")
LISTENS = "0A"  # in /proc/net/tcp


def shared() -> set[str]:
    """Return the names of shared memory that any process made."""
    return {path.name for path in SHARED.iterdir() if path.is_file()}


def listening() -> set[str]:
    """Return the inode of every TCP socket of this host that listens."""
    rows = [
        line.split()
        for table in ("tcp", "tcp6")
        if Path("/proc/net", table).exists()
        for line in Path("/proc/net", table).read_text().splitlines()[1:]
    ]
    return {row[9] for row in rows if row[3] == LISTENS}


def own_sockets() -> set[str]:
    """Return the inode of every socket of this process."""
    return {link[8:-1] for link in _links("/proc/self/fd") if link.startswith("socket:[")}


def left(folder: Path, before: set[str], patience: float = 10.0) -> tuple[str, ...]:
    """Return what is still there of a run some time after its end; its processes are killed.

    `folder` has its ranks' `sessions` and `sockets`, and `before` what was `shared` before it.
    """
    sessions = {int(line) for line in (folder / "sessions").read_text().split()}
    noted = folder / "sockets"
    sockets = set(noted.read_text().split()) if noted.exists() else set()
    end = time.monotonic() + patience
    while True:
        processes = [pid for pid, session in _processes() if session in sessions]
        found = [f"process {pid}" for pid in processes]
        found += [f"socket {inode} listens" for inode in sockets & listening()]
        found += [f"{SHARED}/{name}" for name in _unused(shared() - before)]
        if not found or time.monotonic() > end:
            break
        time.sleep(0.05)
    for pid in processes:  # the test fails, and leaves nothing behind itself
        os.kill(pid, signal.SIGKILL)
    return tuple(found)


def _unused(names: set[str]) -> set[str]:
    """Return which shared memory no process holds: that of others at work is none of ours."""
    if not names:
        return set()
    held = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            held |= {line.split()[-1] for line in (process / "maps").read_text().splitlines()}
        except OSError:  # gone in between
            continue
        held |= set(_links(f"{process}/fd"))
    return {name for name in names if f"{SHARED}/{name}" not in held}


def _links(folder: str) -> Iterator[str]:
    try:
        for name in os.listdir(folder):
            try:
                yield os.readlink(f"{folder}/{name}")
            except OSError:  # closed in between
                continue
    except OSError:
        return


def _processes() -> list[tuple[int, int]]:
    """Return number and session of every process that is no zombie."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:  # gone in between
            continue
        if fields[0] not in "ZX":
            found.append((int(status.parent.name), int(fields[3])))
    return found
