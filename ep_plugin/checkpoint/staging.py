"""Write beside the target, seal with a manifest and rename last: nothing is left half-written.

    .NAME.partial/journal.jsonl     what is asked for, then a line for each file that is whole
    .NAME.partial/checkpoint/       becomes NAME

`manifest.json` says what a checkpoint consists of; `manifest_problems`, whether it still does.

An error or an interrupt from the keyboard removes the folder. A kill cannot; then the same command
goes on where it stopped, and another one refuses to touch what is there.
"""

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ep_plugin import __version__
from ep_plugin.checkpoint.tensors import NewObject, NewTensor
from ep_plugin.checkpoint.writer import Journal
from ep_plugin.errors import ConfigError

MANIFEST = "manifest.json"
MARGIN_BYTES = 64 << 20  # of free room beside the tensors: headers, metadata, the report
_PATIENCE_S = 10  # for the workers of a run that was killed to notice


@dataclass(frozen=True)
class Staging:
    """Where to write: the future target, and what is in it already."""

    folder: Path
    journal: Journal


def _check_room(target: Path, partial: Path, num_bytes: int) -> None:
    """Raise ConfigError unless the disk of `target` has room for `num_bytes` more than is there."""
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
def staged(
    target: Path, source: Path, settings: dict[str, Any], num_bytes: int
) -> Iterator[Staging]:
    """Yield where to write what becomes `target` when the block ends without an error.

    The result depends on the files in `source` and on `settings`, and takes about `num_bytes`.
    Raises ConfigError when the disk has no room for it, another run is at it, or left another
    request unfinished there.
    """
    target = target.absolute()
    partial = target.with_name(f".{target.name}.partial")
    _check_room(target, partial, num_bytes)
    target.parent.mkdir(parents=True, exist_ok=True)
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
            raise ConfigError(f"another conversion is writing {target}; use {sibling(target)}")
        if not partial.is_dir():
            raise ConfigError(f"another conversion has just written {target}; use that")
        yield
    finally:
        os.close(descriptor)


def sibling(target: Path) -> Path:
    """Return a path beside `target` where nothing is."""
    candidates = (target.with_name(f"{target.name}-{number}") for number in range(2, 1_000_000))
    return next(path for path in candidates if not path.exists())


def seal(
    folder: Path,
    hashed: dict[str, dict[str, Any]],
    content: Iterable[NewTensor | NewObject],
    settings: dict[str, Any],
) -> None:
    """Write the manifest of all files under `folder`; `hashed` has hashes that are known.

    Files: {name: {num_bytes, sha256}}; tensors: {name: {dtype, shape}}.
    """
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    tensors = {
        entry.name: {"dtype": str(entry.info.dtype), "shape": list(entry.info.shape)}
        for entry in content
        if isinstance(entry, NewTensor)
    }
    files = {name: hashed.get(name) or _digest(folder / name) for name in names}
    manifest = {"ep_plugin": __version__, "settings": settings, "files": files, "tensors": tensors}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def manifest_problems(folder: Path) -> list[str]:
    """Return what is wrong with the files under `folder`; empty when each is as it was written.

    Raises ConfigError where there is no manifest.
    """
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{folder} has no readable {MANIFEST} ({error}); give a folder that convert wrote"
        ) from error
    return [problem for name, entry in files.items() if (problem := _problem(folder / name, entry))]


def _problem(path: Path, entry: dict[str, Any]) -> str | None:
    if not path.is_file():
        return f"{path} is missing"
    size = path.stat().st_size
    if size != entry["num_bytes"]:
        return f"{path} has {size} bytes instead of {entry['num_bytes']}"
    return None if _digest(path) == entry else f"{path} has other bytes than were written"


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"num_bytes": path.stat().st_size, "sha256": digest}
