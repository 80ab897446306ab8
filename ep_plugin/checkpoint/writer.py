"""The files of a checkpoint, written one by one, by one process or several, and remembered.

A file is a unit of work: it is written under another name, renamed when whole, and entered in the
journal. Which tensors a file holds does not depend on the number of processes nor on what is there
already, so every way of getting to the end gives the same bytes.
"""

import hashlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import IO, Any

import torch

from ep_plugin.checkpoint.journal import Journal as Journal
from ep_plugin.checkpoint.journal import is_whole
from ep_plugin.errors import ConfigError

OnBytes = Callable[[int], object]  # called with a number of bytes just written


class HashedFile:
    """A file being written whose SHA-256 is taken on the way."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._hash, self._size = stream, hashlib.sha256(), 0
        self.error: OSError | None = None  # of the disk; torch.save raises another one after it

    def write(self, data: Any) -> int:
        self._hash.update(data)
        self._size += memoryview(data).nbytes
        try:
            return self._stream.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._stream.flush()

    def tell(self) -> int:
        return self._size

    def digest(self) -> dict[str, Any]:
        """Return the size and the hash so far."""
        return {"num_bytes": self._size, "sha256": self._hash.hexdigest()}


@dataclass(frozen=True)
class Unit:
    """One file: its name, the bytes of tensors in it, and how to write it.

    `write(stream, on_bytes)` returns what must be remembered of it, as JSON can hold it.
    """

    name: str
    num_bytes: int
    write: Callable[[HashedFile, OnBytes], Any]


def write_units(
    units: Sequence[Unit],
    folder: Path,
    journal: Journal,
    processes: int,
    on_bytes: OnBytes,
) -> list[dict[str, Any]]:
    """Write what the journal lacks; returns for every unit {num_bytes, sha256, content}.

    Raises what a unit raises, ConfigError when a process was killed.
    """
    todo = []
    for unit in units:
        if is_whole(folder / unit.name, journal.done.get(unit.name)):
            on_bytes(unit.num_bytes)
        else:
            todo.append(unit)
    made = _in_processes if processes > 1 and len(todo) > 1 else _in_this_process
    for name, record in made(todo, folder, min(processes, len(todo)), on_bytes):
        journal.add(name, record)
    return [journal.done[unit.name] for unit in units]


def _write(unit: Unit, folder: Path, on_bytes: OnBytes) -> dict[str, Any]:
    path = folder / unit.name
    part = path.with_name(path.name + ".part")
    part.unlink(missing_ok=True)  # of a conversion that was killed
    with part.open("xb") as stream:
        hashed = HashedFile(stream)
        try:
            content = unit.write(hashed, on_bytes)
        except RuntimeError as error:
            raise hashed.error or error from error
        stream.flush()
        os.fsync(stream.fileno())
    part.rename(path)
    return {**hashed.digest(), "content": content}


Made = Iterator[tuple[str, dict[str, Any]]]


def _in_this_process(units: Iterable[Unit], folder: Path, _: int, on_bytes: OnBytes) -> Made:
    for unit in units:
        yield unit.name, _write(unit, folder, on_bytes)


def _in_processes(units: Sequence[Unit], folder: Path, processes: int, on_bytes: OnBytes) -> Made:
    """Hand units to forked workers as they become idle.

    Forked, so that nothing of a unit need be pickled; each computes on one thread.
    """
    context = multiprocessing.get_context("fork")
    workers: dict[Any, multiprocessing.process.BaseProcess] = {}  # our end of its pipe -> it
    try:
        for _ in range(processes):
            ours, theirs = context.Pipe()
            others = [*workers, ours]
            process = context.Process(target=_work, args=(units, folder, theirs, others))
            process.start()
            theirs.close()
            workers[ours] = process
        waiting = list(range(len(units)))
        for ours in workers:
            ours.send(waiting.pop(0))
        running = len(workers)
        while running:
            end: Any
            for end in wait(list(workers)):
                message = _receive(end, workers[end])
                if isinstance(message, int):
                    on_bytes(message)
                elif isinstance(message, BaseException):
                    raise message
                else:
                    yield message
                    if waiting:
                        end.send(waiting.pop(0))
                    else:
                        running -= 1
    finally:
        for ours, worker in workers.items():
            worker.kill()
            worker.join()
            ours.close()


def _receive(ours: Any, process: multiprocessing.process.BaseProcess) -> Any:
    try:
        return ours.recv()
    except EOFError as error:
        process.join()
        raise ConfigError(
            f"a process of --processes ended with exit code {process.exitcode}, perhaps for want "
            "of memory; use --processes 1, which needs least"
        ) from error


def _work(units: Sequence[Unit], folder: Path, pipe: Connection, others: list[Connection]) -> None:
    """Write the units whose numbers come through `pipe`; ends when the other end is gone."""
    for other in others:
        other.close()  # else a worker would keep its siblings' pipes, and its own, open
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    try:
        while True:
            unit = units[pipe.recv()]
            try:
                pipe.send((unit.name, _write(unit, folder, pipe.send)))
            except (EOFError, BrokenPipeError, ConnectionResetError):
                raise
            except Exception as error:  # whatever it is, the parent raises it
                pipe.send(error)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        os._exit(0)
