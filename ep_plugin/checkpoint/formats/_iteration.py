"""An iteration's folder: which one it is, and its pickles.

A pickle may name anything at all, while an input file is not to be trusted: `_pickle.py` reads it
without doing what it says, `_archive.py` the archive around it, and exact lists say what becomes of
it: `_values.py` for run arguments and tensors, `_metadata.py` for `.metadata`.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import NoneType
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata

from ep_plugin.checkpoint.formats._archive import open_archive
from ep_plugin.checkpoint.formats._metadata import NAMES, to_metadata
from ep_plugin.checkpoint.formats._pickle import read_pickle
from ep_plugin.checkpoint.formats._values import Values
from ep_plugin.checkpoint.inert import Unreadable, explained
from ep_plugin.checkpoint.tensors import Damaged
from ep_plugin.errors import ConfigError

MAX_METADATA = 512 << 20  # bytes; those of 100,000 chunks are some 50 MB
TRACKER = "latest_checkpointed_iteration.txt"
CONFIG = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}  # metadata.json
COMMON_STATE = "common_state/shard_0_1"  # run arguments and counters, where common.pt is not there
MAX_OBJECT = 64 << 20  # bytes of one object, such as the run arguments
_MAX_TRACKER = 1024


def iteration_folder(path: Path, is_iteration: Callable[[Path], bool]) -> Path:
    """Return the folder of one iteration; `path` is that, or what --save named.

    Raises ConfigError when it is neither.
    """
    if not path.is_dir():
        raise ConfigError(f"checkpoint {path} is not a folder; give the folder that --save named")
    tracker = path / TRACKER
    if not tracker.is_file():
        if is_iteration(path):
            return path
        raise ConfigError(
            f"{path} is not a checkpoint: it has neither {TRACKER} nor metadata.json; "
            "give the folder that --save named"
        )
    with inside(tracker, path).open("rb") as stream:
        word = stream.read(_MAX_TRACKER).decode(errors="replace").strip()
    if word != "release" and not (word.isascii() and word.isdecimal() and len(word) < 19):
        raise ConfigError(
            f"{tracker} must hold an iteration number or 'release'; got {word[:80]!r}"
        )
    folder = path / (word if word == "release" else f"iter_{int(word):07d}")
    if not folder.is_dir():
        raise ConfigError(
            f"{tracker} names {folder.name}, which {path} does not have; "
            "give one of its iteration folders instead"
        )
    return inside(folder, path)


def inside(path: Path, folder: Path) -> Path:
    """Return `path`; raises Damaged when symbolic links lead it out of `folder`."""
    try:
        leads_out = not path.resolve().is_relative_to(folder.resolve())
    except (RuntimeError, OSError) as error:  # a link to itself
        raise Damaged(f"{path} leads nowhere ({error}); put the file itself there") from error
    if leads_out and path.is_dir():
        raise Damaged(
            f"{path} is a link that leads out of {folder}; give the folder {path.resolve()} itself"
        )
    if leads_out:
        raise Damaged(
            f"{path} is a link that leads out of {folder}; put the file itself there, or give a "
            "whole checkpoint"
        )
    return path


def read_small(path: Path, folder: Path) -> bytes:
    """Return the bytes of a file that describes others; raises Damaged."""
    if (size := inside(path, folder).stat().st_size) > MAX_METADATA:
        raise Damaged(
            f"{path} has {size} bytes, and a file of its kind at most {MAX_METADATA}; give another "
            "checkpoint"
        )
    return path.read_bytes()


def load_object(content: bytes) -> Any:
    """Return what `torch.save` wrote into `content`; raises Unreadable.

    What is on no list is a `Made` or a `Name`.
    """
    archive = open_archive(bytearray(content))
    return Values(archive).build(read_pickle(archive.pickle(MAX_OBJECT)))


def load_common(content: bytes, folder: Path, listed: bool = False) -> dict[str, Any]:
    """Return the run arguments and counters of `folder` from their archive; raises Damaged.

    `listed`: they are the one entry of a list.
    """
    try:
        value = load_object(content)
        if listed:
            if type(value) is not list or len(value) != 1:
                raise Unreadable("it is no list of one")
            (value,) = value
        if type(value) is not dict or not all(type(key) is str for key in value):
            raise Unreadable("it is no dictionary")
        if type(value.get("content_metadata", {})) not in (dict, NoneType):
            raise Unreadable("its content_metadata is no dictionary")
    except (Unreadable, MemoryError) as error:
        raise Damaged(
            f"the run arguments in {folder} {explained(error, 'cannot be read')}"
        ) from error
    return value


def load_metadata(folder: Path) -> Metadata:
    """Return what `.metadata` says of the chunks in `folder`; raises Damaged."""
    path = folder / ".metadata"
    if not path.is_file():
        raise Damaged(f"{folder} has no .metadata: its save did not finish; give another one")
    content = read_small(path, folder)
    try:
        with _without_collector():
            return to_metadata(read_pickle(content, NAMES))
    except (Unreadable, MemoryError) as error:
        raise Damaged(f"{path} {explained(error, 'cannot be read')}") from error


@contextmanager
def _without_collector() -> Iterator[None]:
    """Pause the collector of cycles: none are made, and looking for them was half of the time."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()
