"""Write beside the target and rename last, so that a failure leaves nothing half-written behind.

    .NAME.partial/journal.jsonl     what is asked for, then a line for each file that is whole
    .NAME.partial/checkpoint/       becomes NAME

An error or an interrupt from the keyboard removes the folder. A kill cannot; then the same command
goes on where it stopped, and another one refuses to touch what is there.
"""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ep_plugin.errors import ConfigError

MARGIN_BYTES = 64 << 20  # of free room beside the tensors: headers, metadata, the report
_PATIENCE_S = 10  # for the workers of a run that was killed to notice


@dataclass
class Journal:
    """The files that are whole, by name; `path` None keeps them in memory alone."""

    path: Path | None = None
    done: dict[str, Any] = field(default_factory=dict)

    def add(self, name: str, record: dict[str, Any]) -> None:
        """Remember a file, on disk before anything else is done."""
        self.done[name] = record
        if self.path is not None:
            with self.path.open("a") as stream:
                stream.write(json.dumps([name, record]) + "\n")
                stream.flush()
                os.fsync(stream.fileno())


@dataclass(frozen=True)
class Staging:
    """Where to write: the future target, and what is in it already."""

    folder: Path
    journal: Journal


def check_free(target: Path) -> None:
    """Raise ConfigError unless `target` is missing or an empty folder."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"output {target} exists and is not empty; use {_sibling(target)}")


def check_room(target: Path, num_bytes: int) -> None:
    """Raise ConfigError unless the disk of `target` has room for `num_bytes` more than is there."""
    target = target.absolute()
    partial = _partial(target)
    there = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
    parent = next(folder for folder in target.parents if folder.is_dir())
    free, needed = shutil.disk_usage(parent).free, num_bytes + MARGIN_BYTES - there
    if free < needed:
        raise ConfigError(
            f"the disk of {parent} has {free / 2**30:.2f} GiB free, and the output needs "
            f"{needed / 2**30:.2f} GiB; use fewer --num-experts, --drop-optimizer or another disk"
        )


def _state_of(folder: Path) -> dict[str, Any]:
    """Return what a result depends on of the checkpoint in `folder`."""
    stats = {str(path): path.stat() for path in sorted(folder.rglob("*")) if path.is_file()}
    return {
        "--from": str(folder.absolute()),
        "its files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
    }


@contextmanager
def staged(target: Path, source: Path, settings: dict[str, Any]) -> Iterator[Staging]:
    """Yield where to write what becomes `target` when the block ends without an error.

    The result depends on the files in `source` and on `settings`. Raises ConfigError when another
    run is at it, or left another request unfinished there.
    """
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(target)
    request = json.loads(json.dumps(_state_of(source) | settings))
    partial.mkdir(exist_ok=True)
    with _locked(partial, target):
        staging = _open(partial, request)
        try:
            yield staging
            staging.folder.rename(target)
        finally:  # not reached by a kill
            shutil.rmtree(partial)


def _open(partial: Path, request: dict[str, Any]) -> Staging:
    path, folder = partial / "journal.jsonl", partial / "checkpoint"
    text = path.read_text() if path.is_file() else ""
    lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]  # whole ones
    old, entries = (lines[0], lines[1:]) if lines else (request, [])
    different = [key for key in {**old, **request} if old.get(key) != request.get(key)]
    if different:
        values = ", ".join(f"{k} was {old.get(k)} and is {request.get(k)}" for k in different)
        raise ConfigError(
            f"{partial} holds an unfinished conversion of another kind ({values}); repeat "
            "that command to finish it, or remove that folder to start anew"
        )
    folder.mkdir(exist_ok=True)
    fresh = path.with_suffix(".new")
    fresh.write_text("".join(f"{json.dumps(line)}\n" for line in [old, *entries]))
    fresh.replace(path)
    return Staging(folder, Journal(path, dict(entries)))


@contextmanager
def _locked(partial: Path, target: Path) -> Iterator[None]:
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        for _ in range(_PATIENCE_S * 10):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.1)
        else:
            raise ConfigError(f"another conversion is writing {target}; use {_sibling(target)}")
        if not partial.is_dir():
            raise ConfigError(f"another conversion has just written {target}; use that")
        yield
    finally:
        os.close(descriptor)


def _partial(target: Path) -> Path:
    return target.with_name(f".{target.name}.partial")


def _sibling(target: Path) -> Path:
    candidates = (target.with_name(f"{target.name}-{number}") for number in range(2, 1_000_000))
    return next(path for path in candidates if not path.exists())
