"""A save that fails: one sentence that names the disk, and nothing half-written that stays.

Megatron ends such a run with a traceback, which for a failed worker does not say of what, leaves
the folder that it began, and on a full disk may leave an empty tracker, which no start can read.
Here the folder goes where this save made it, and the tracker says again what it said before.
"""

import importlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
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
        left = [begun for begun in saves if str(begun.iteration) != not_saved.newest(begun.root)]
        if left and _tell(left[0], error):
            sys.exit(1)
        raise


def _tell(begun: Begun, error: BaseException) -> bool:
    """Say why the save failed, and remove it; return whether the disk is the reason."""
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
    _clean(begun)
    newest = not_saved.newest(begun.root)
    print(
        f"ep_plugin: error: iteration {begun.iteration} is not saved: {said}; the newest whole "
        f"checkpoint is {f'{begun.root}/iter_{newest:0>7}' if newest else 'still to come'}; "
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
    if not begun.was_there:
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
