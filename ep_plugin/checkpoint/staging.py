"""Write beside the target, seal with a manifest and rename last: nothing is left half-written.

    .NAME.partial/journal.jsonl     what is asked for, then a line for each file that is whole
    .NAME.partial/checkpoint/       becomes NAME

`manifest.json` says what a checkpoint consists of (`manifest.py`).

An error or an interrupt from the keyboard removes the folder. A kill cannot; then the same command
goes on where it stopped, and another one refuses to touch what is there.
"""

import errno
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ep_plugin import __version__
from ep_plugin.checkpoint.journal import FILE, Journal, open_journal
from ep_plugin.errors import ConfigError
from ep_plugin.untrusted import reason
from ep_plugin.written import FULL

MARGIN_BYTES = 64 << 20  # of free room beside the tensors: headers, metadata, the report
_PATIENCE_S = 10  # for the workers of a run that was killed to notice
_REFUSED = (errno.EROFS, errno.EACCES, errno.EPERM)


@dataclass(frozen=True)
class Staging:
    """Where to write: the future target, and what is in it already."""

    folder: Path
    journal: Journal


def _check_room(target: Path, partial: Path, num_bytes: int) -> None:
    """Raise ConfigError unless the disk of `target` has room for `num_bytes` more than is there."""
    parent = _folder_above(target)
    if not os.access(parent, os.W_OK):  # of such a disk the room does not matter
        raise ConfigError(f"{parent} cannot be written; use another --to")
    there = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
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
def staged(
    target: Path, source: Path, settings: dict[str, Any], num_bytes: int
) -> Iterator[Staging]:
    """Yield where to write what becomes `target` when the block ends without an error.

    The result depends on the files in `source` and on `settings`, and takes about `num_bytes`.
    Raises ConfigError when the disk has no room for it, another run is at it, or left another
    request unfinished there.
    """
    target = target.absolute() if target.name not in ("", "..") else target.resolve()
    partial = target.with_name(f".{target.name}.partial")
    if partial.is_symlink() or (partial.exists() and not partial.is_dir()):
        raise ConfigError(f"{partial} is no folder of a conversion; remove it, or use another --to")
    request = json.loads(json.dumps(_state_of(source) | settings | {"ep_plugin": __version__}))
    with _naming_the_disk(target):
        _check_room(target, partial, num_bytes)
        target.parent.mkdir(parents=True, exist_ok=True)
        is_new = not partial.exists()
        partial.mkdir(exist_ok=True)
        with _locked(partial, target):
            try:
                staging = _open(partial, request)
            except OSError:
                if is_new:
                    shutil.rmtree(partial)
                raise
            try:
                yield staging
                staging.folder.rename(target)
            finally:  # not reached by a kill
                shutil.rmtree(partial)


@contextmanager
def _naming_the_disk(target: Path) -> Iterator[None]:
    """Raise ConfigError for an error of the system's: the disk, or the file that it is about."""
    try:
        yield
    except OSError as error:
        parent = _folder_above(target)
        disk = f"the disk of {parent}, with {shutil.disk_usage(parent).free / 2**30:.2f} GiB free,"
        if error.errno in FULL:
            text = f"{disk} takes no more ({reason(error)}); use --to on another disk"
        elif error.errno in _REFUSED:
            text = f"{disk} cannot be written ({error}); use another --to"
        else:
            text = f"{error}; nothing was written to {target}; use another --to or --from"
        raise ConfigError(text) from error


def _folder_above(target: Path) -> Path:
    return next(folder for folder in target.parents if folder.is_dir())


def _open(partial: Path, request: dict[str, Any]) -> Staging:
    journal = open_journal(partial / FILE, request)
    folder = partial / "checkpoint"
    if folder.is_symlink():
        raise ConfigError(f"{folder} is a symbolic link; remove {partial} to start over")
    folder.mkdir(exist_ok=True)
    for path in folder.rglob("*"):  # what was being written, and what is written anew
        if path.is_symlink() or (path.is_file() and path.name not in journal.done):
            path.unlink()
    return Staging(folder, journal)


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
            raise ConfigError(f"another conversion is writing {target}; use {sibling(target)}")
        if not partial.is_dir():
            raise ConfigError(f"another conversion has just written {target}; use that")
        yield
    finally:
        os.close(descriptor)


def sibling(target: Path) -> Path:
    """Return a path beside `target` where nothing is; of the root, one below it."""
    if target.name in ("", ".."):
        target = target.resolve()
    name = target.name or "converted"
    candidates = (target.parent / f"{name}-{number}" for number in range(2, 1_000_000))
    return next(path for path in candidates if not path.exists())
