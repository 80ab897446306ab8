"""What the files hold that ranks read: hosts may know them by other names, and must agree on this.

A few bytes of text stand for each: of a checkpoint its iteration, of other files their size and a
hash of their beginning and end. What this rank may not look at is left to the others.
"""

import errno
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ep_plugin.checkpoint.formats.megatron_dist import TRACKER
from ep_plugin.megatron.arguments.digest import READ

UNKNOWN = "?"  # what this rank cannot see: it need not, and differs from nothing
CHECKPOINTS = ("load", "pretrained_checkpoint", "bert_load", "ict_load")
DATA = ("data_path", "train_data_path", "valid_data_path", "test_data_path")
_PART = 1 << 20  # bytes at both ends of a file that are hashed
_INDEX_PART = 1 << 12  # of an index of data: every rank reads them
_INDEXES = 64  # that are hashed; of further ones the sizes count


def contents(args: Any) -> dict[str, str]:
    """Return, by argument, what is in the files that Megatron's arguments name."""
    found = {}
    for name in READ:
        value = getattr(args, name, None)
        if not value:
            continue
        try:
            found[name] = _content(args, name, value)
        except (OSError, ValueError) as error:
            # What is too long for a name is no file: the words themselves are compared.
            too_long = isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG
            found[name] = str(value) if too_long else UNKNOWN
    folder = getattr(args, "non_persistent_global_ckpt_dir", None)
    if folder and args.load:
        try:
            found["non_persistent_global_ckpt_dir"] = checkpoint_in(str(folder), None)
        except (OSError, ValueError):
            found["non_persistent_global_ckpt_dir"] = UNKNOWN
    return found


def _content(args: Any, name: str, value: Any) -> str:
    if name in CHECKPOINTS:
        return checkpoint_in(str(value), args.ckpt_step if name == "load" else None)
    if name in DATA:
        return _data(value if isinstance(value, (list, tuple)) else [value])
    return fingerprint(str(value))


def checkpoint_in(folder: str, step: int | None) -> str:
    """Return which iteration a run that loads `folder` begins with; `step` is what was asked for.

    With it a hash of what the checkpoint keeps beside its weights, or of the ends of its first
    file: two runs have equal iterations.
    """
    if "://" in folder:
        return UNKNOWN
    tracker = Path(folder) / TRACKER
    if step is None and not tracker.is_file():
        return "no checkpoint"
    iteration = str(step) if step is not None else tracker.read_text().strip()
    inside = Path(folder)
    if iteration.isdigit():
        inside /= f"iter_{int(iteration):07d}"
    elif iteration == "release":
        inside /= iteration
    common = inside / "common.pt"
    if common.is_file():
        return f"iteration {iteration}, {fingerprint(str(common))} beside the weights"
    # Newer releases keep it among the weights: the end of a file lists checksums of what is in it.
    if first := min(inside.glob("*.distcp"), default=None):
        return f"iteration {iteration}, its {first.name} of {fingerprint(str(first))}"
    return f"iteration {iteration}" if inside.is_dir() else f"iteration {iteration}, not there"


def fingerprint(place: str, part: int = _PART) -> str:
    """Return size and hash of a file, or of a folder's list of files; what is no place stays."""
    path = Path(place)
    if path.is_file():
        size = path.stat().st_size
        with path.open("rb") as file:
            found = hashlib.sha256(file.read(part))
            if size > part:
                file.seek(max(part, size - part))
                found.update(file.read(part))
        return f"{size} bytes ({found.hexdigest()[:8]})"
    if path.is_dir():
        listed = sorted((f.name, f.stat().st_size) for f in path.iterdir() if f.is_file())
        return f"{len(listed)} files ({hashlib.sha256(repr(listed).encode()).hexdigest()[:8]})"
    return place


def _data(words: Sequence[Any]) -> str:
    """Return what is behind a list of prefixes of data, with weights between them or not."""
    found, files, total = hashlib.sha256(), 0, 0
    for word in map(str, words):
        try:
            found.update(repr(float(word)).encode())
            continue
        except ValueError:
            pass
        index, data = Path(f"{word}.idx"), Path(f"{word}.bin")
        if not index.is_file() or not data.is_file():
            return UNKNOWN
        files, total = files + 1, total + data.stat().st_size
        what = str(index.stat().st_size)
        if files <= _INDEXES:
            what = fingerprint(str(index), _INDEX_PART)
        found.update(f"{data.stat().st_size} {what}".encode())
    return f"{files} of {total} bytes ({found.hexdigest()[:8]})"
