"""The note that a run leaves beside its checkpoints when it ends without saving an iteration."""

import json
from pathlib import Path
from typing import Any

from ep_plugin.checkpoint.formats.megatron_dist import TRACKER

NOTE = "not_saved.json"


def leave(folder: Path, iteration: int, why: str) -> None:
    """Note that `iteration` was not saved, and why: one sentence without its end."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / NOTE).write_text(json.dumps({"iteration": iteration, "why": why}) + "\n")


def remove(folder: Path) -> None:
    """Take the note away: a later iteration is saved."""
    (folder / NOTE).unlink(missing_ok=True)


def newest(folder: Path) -> str | None:
    """Return the iteration that Megatron would load of this folder, as its tracker says it."""
    tracker = folder / TRACKER
    text = tracker.read_text(errors="replace").strip() if tracker.is_file() else ""
    return text or None


def at_start(args: Any) -> str | None:
    """Return what this run should know of the one before it; None where that ended well."""
    for folder in dict.fromkeys(Path(name) for name in (args.load, args.save) if name):
        try:
            note = json.loads((folder / NOTE).read_text())
            iteration, why = int(note["iteration"]), str(note["why"])
        except (OSError, ValueError, KeyError, TypeError):
            continue  # none, or not ours
        start = str(args.ckpt_step) if args.ckpt_step is not None else newest(folder)
        if start is None or not start.isdecimal() or int(start) < iteration:
            goes_on = "begins anew" if start is None else f"goes on from {start}"
            return f"the run before did not save iteration {iteration}: {why}; this one {goes_on}"
    return None
