"""A save that fails: one sentence that names the disk, and nothing half-written that stays.

Megatron ends such a run with a traceback, which for a failed worker does not say of what, leaves
the folder that it began, and on a full disk may leave an empty tracker, which no start can read.
Here rank 0 removes the folder that this save made, and the tracker says again what it said before.
What is whole, is no newer than the tracker, or failed in an exchange, in which another rank may be
further, stays: a half-written folder that the tracker does not name harms nobody.
"""

import importlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException

from ep_plugin.checkpoint.formats.megatron_dist import TRACKER
from ep_plugin.megatron.arguments import not_saved
from ep_plugin.megatron.seams.patches import Patches

TRAINING = "megatron.training.training"
PROBE = 2**20  # bytes that a disk which is not full takes
OTHERS_SPEAK = 20  # seconds in which the rank that knows why says so, and ends the others


@dataclass(frozen=True)
class Begun:
    """A save that is under way."""

    root: Path  # where iterations and the tracker lie
    iteration: int
    was_there: bool  # its folder, before
    newest: str | None  # what the tracker said before

    @property
    def folder(self) -> Path:
        return self.root / f"iter_{self.iteration:07d}"

    @property
    def is_named(self) -> bool:
        """Whether the tracker says since then that it is on disk, it or one after it."""
        newest = not_saved.newest(self.root)
        if newest == self.newest:
            return newest == str(self.iteration)
        return _number(newest) >= self.iteration

    @property
    def is_written(self) -> bool:
        """Whether what Megatron writes after all data is there."""
        files = (self.folder / name for name in (".metadata", "metadata.json"))
        return any(file.is_file() and file.stat().st_size for file in files)


def changes(patches: Patches) -> None:
    """Say of what a save failed, and leave nothing of it behind."""
    training = importlib.import_module(TRAINING)
    under_way: list[Begun] = []  # asynchronous ones, oldest first

    def with_save(
        original: Callable[..., Any], iteration: int, *rest: Any, **settings: Any
    ) -> None:
        args = training.get_args()
        root = _root(args, settings.get("non_persistent_ckpt", False))
        folder = root / f"iter_{iteration:07d}"
        begun = Begun(root, iteration, folder.exists(), not_saved.newest(root))
        with _told([begun]):
            original(iteration, *rest, **settings)
        if args.async_save:
            under_way.append(begun)

    def with_finalize(original: Callable[..., Any], *rest: Any, **settings: Any) -> None:
        with _told(under_way):
            original(*rest, **settings)
        queue = importlib.import_module("megatron.training.async_utils")
        if under_way and queue.is_empty_async_queue():
            under_way.clear()
        under_way[:] = [begun for begun in under_way if not begun.is_named]

    patches.wrap(f"{TRAINING}:save_checkpoint", with_save, "a save that fails raises out of it")
    patches.wrap(
        f"{TRAINING}:maybe_finalize_async_save",
        with_finalize,
        "an asynchronous save that failed raises out of it",
    )


def _root(args: Any, non_persistent: bool) -> Path:
    """Return the folder that Megatron saves into."""
    if non_persistent and args.non_persistent_ckpt_type == "global":
        return Path(args.non_persistent_global_ckpt_dir or f"{args.save}/non_persistent")
    if non_persistent:  # each rank's own, and tidied up by what saves there
        return Path(args.non_persistent_local_ckpt_dir)
    return Path(args.save)


@contextmanager
def _told(saves: list[Begun]) -> Iterator[None]:
    """Say what failed, and clean up, where what is inside fails; end where it is the disk."""
    try:
        yield
    except (Exception, CheckpointException) as error:
        # What the tracker names is whole: the next one failed, or what comes after a save did.
        left = [begun for begun in saves if not begun.is_named]
        failed = next((begun for begun in left if not begun.is_written), left[-1] if left else None)
        if failed is not None:
            older = [begun for begun in saves[: saves.index(failed)] if begun.root == failed.root]
            newest = str(older[-1].iteration) if older else failed.newest
            if _tell(replace(failed, newest=newest), error):
                sys.exit(1)
        raise


def _tell(begun: Begun, error: BaseException) -> bool:
    """Say why the save failed, and tidy up; return whether the disk is the reason.

    `begun.newest` is what the tracker should name.
    """
    if isinstance(error, CheckpointException) and not error.failures:
        time.sleep(OTHERS_SPEAK)
        return True
    disk, is_full = _disk(begun.root)
    ranks = error.failures if isinstance(error, CheckpointException) else [os.environ.get("RANK")]
    causes = list(_causes(error))
    of_files = [cause for cause in causes if isinstance(cause, OSError)]
    why = (str((of_files or causes)[-1]).strip().splitlines() or [type(error).__name__])[-1]
    said = f"saving it to {begun.root} failed on rank {', '.join(map(str, ranks))}: "
    said += disk if is_full else f"{why} ({disk})"
    is_known = bool(of_files) or is_full or bool(getattr(error, "failures", None))
    is_first = os.environ.get("RANK", "0") == "0"  # the one that writes the tracker, or never will
    if is_first and is_known:
        _clean(begun)
    newest = not_saved.newest(begun.root)
    stays = f"; {begun.folder} may be half-written, and stays" if begun.folder.exists() else ""
    print(
        f"ep_plugin: error: iteration {begun.iteration} "
        f"{'is not' if is_first or is_known else 'may not be'} saved: {said}; the newest whole "
        f"checkpoint is {f'{begun.root}/iter_{newest:0>7}' if newest else 'still to come'}"
        f"{stays if newest != str(begun.iteration) else ''}; "
        f"{'make room, or use another --save, and' if is_full or of_files else 'then'} start again",
        file=sys.stderr,
        flush=True,
    )
    with suppress(OSError):  # where there is no room for it, either
        not_saved.leave(begun.root, begun.iteration, said)
    return bool(of_files) or is_full


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield the error and what it came of, the first reason last."""
    yield error
    inner = [wrapped[0] for wrapped in getattr(error, "failures", {}).values()]
    for cause in (*inner, error.__cause__ or error.__context__):
        if isinstance(cause, BaseException):
            yield from _causes(cause)


def _disk(folder: Path) -> tuple[str, bool]:
    """Return what is to say of a folder's disk, and whether it takes no more.

    It is written to: neither a quota nor a disk that is read-only shows in its free bytes.
    """
    probe, room = folder / f".probe-{os.getpid()}", "what is free is unknown"
    try:
        usage = shutil.disk_usage(folder)
        room = f"{usage.free:,} of {usage.total:,} bytes free"
        try:
            with probe.open("wb") as file:
                file.write(bytes(PROBE))
                file.flush()
                os.fsync(file.fileno())
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        return f"the disk of {folder} takes no more ({error.strerror}, {room})", True
    return f"the disk of {folder} has {room}", False


def _clean(begun: Begun) -> None:
    """Remove what the save made, and write the tracker again where it lost what it said."""
    newest = _number(not_saved.newest(begun.root))
    if not begun.was_there and not begun.is_written and newest < begun.iteration:
        shutil.rmtree(begun.folder, ignore_errors=True)
    tracker = begun.root / TRACKER
    if not tracker.exists() or not_saved.newest(begun.root) is not None:
        return
    if begun.newest is None:
        tracker.unlink()
        return
    fresh = tracker.with_suffix(".new")
    fresh.write_text(begun.newest)
    fresh.replace(tracker)


def _number(newest: str | None) -> int:
    return int(newest) if newest and newest.isdecimal() else -1
