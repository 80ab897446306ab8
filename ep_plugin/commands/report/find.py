"""What a run left: TensorBoard folders, logs and checkpoints below the paths that were given."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ep_plugin.commands.report.logs import has_iterations
from ep_plugin.errors import ConfigError
from ep_plugin.untrusted import cut

TRACKER = "latest_checkpointed_iteration.txt"
LOGS = (".log", ".out", ".err", ".txt")
MOST_FILES = 100_000
DEPTH = 4  # of folders below the one that is given
_ASIDE = ("cache", "report", "iter_", "release", ".")  # folders that begin so hold no logs
_FROM_CHECKPOINT = {  # argument of the run -> its name in the summary
    "num_experts": "experts",
    "moe_router_topk": "topk",
    "expert_model_parallel_size": "ep",
    "world_size": "ranks",
}


@dataclass
class Found:
    """Where a run's values are, and what was looked for in vain."""

    events: list[Path] = field(default_factory=list)  # folders
    logs: list[Path] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)


def find(paths: Sequence[Path]) -> Found:
    """Return what is at `paths`; raises ConfigError for a path that is nothing of a run.

    A checkpoint names the TensorBoard folder of its run, which is taken where there is no other.
    """
    found, checkpoints, several = Found(), [], list[Path]()
    for path in paths:
        if not _exists(path):
            raise ConfigError(
                f"--run must be a folder or a log of a run; {str(path)!r} does not exist; use what "
                "--tensorboard-dir or --save named, or a file with the run's output"
            )
        if path.is_file():
            _add_file(found, path)
            continue
        files = list(_below(path))
        found.events += sorted({file.parent for file in files if "tfevents" in file.name})
        checkpoints += [file.parent for file in files if file.name == TRACKER]
        logs = [file for file in files if file.suffix in LOGS and has_iterations(file)]
        if len(logs) > 1:
            several += sorted(logs)
            names = ", ".join(map(str, several[:5]))
            found.missing.append(f"logs: several are there ({names}), none was read; name one")
        else:
            found.logs += logs
    found.events = list(dict.fromkeys(found.events))
    for folder in checkpoints[:1]:
        _add_checkpoint(found, folder)
    if not checkpoints:
        found.missing.append("experts, top-k and layout: no checkpoint is there that says")
    if len(found.events) > 1:
        names = ", ".join(str(folder) for folder in found.events[:5])
        raise ConfigError(f"--run holds several runs ({names}); use --run {found.events[0]}")
    if several and not found.events and not found.logs:
        names = ", ".join(map(str, several[:5]))
        raise ConfigError(f"--run holds several logs ({names}); use --run {several[0]}")
    if not found.events and not found.logs:
        given = " ".join(map(str, paths))
        raise ConfigError(
            f"--run must lead to TensorBoard files or to a log with Megatron's iterations; {given} "
            "has none; use what --tensorboard-dir named, or a file with the run's output"
        )
    return found


def _exists(path: Path) -> bool:
    try:
        return path.is_file() or path.is_dir()
    except (OSError, ValueError):  # a name that no file has
        return False


def _below(folder: Path) -> Iterator[Path]:
    seen = 0
    for here, names, files in os.walk(folder):
        depth = len(Path(here).relative_to(folder).parts)
        names[:] = [name for name in names if depth < DEPTH and not name.startswith(_ASIDE)]
        for path in (Path(here) / name for name in files):
            if path.is_file():  # no pipe, which would be waited for, and no link to nothing
                yield path
            if (seen := seen + 1) > MOST_FILES:
                raise ConfigError(
                    f"--run {cut(str(folder))} has more than {MOST_FILES} files; use the folder of "
                    "one run, or its TensorBoard folder and its log"
                )


def _add_file(found: Found, path: Path) -> None:
    if "tfevents" in path.name:
        found.events.append(path.parent)
    elif has_iterations(path):
        found.logs.append(path)
    else:
        raise ConfigError(
            f"--run {path} has no line of an iteration of Megatron's; use a file with the output "
            "of the last rank, or the folder that --tensorboard-dir named"
        )


def _add_checkpoint(found: Found, folder: Path) -> None:
    """Add what the arguments in the newest checkpoint say."""
    from ep_plugin.checkpoint.formats.megatron_dist import open_checkpoint

    try:
        args = open_checkpoint(folder).common.get("args")
    except ConfigError as error:
        found.missing.append(f"experts, top-k and layout: {error}")
        return
    for name, key in _FROM_CHECKPOINT.items():
        value = getattr(args, name, None)
        found.facts[key] = value if type(value) is int else None
    named = getattr(args, "tensorboard_dir", None)
    for place in (Path(str(named)) if named else None, folder.parent / "tensorboard"):
        if not found.events and place is not None and _has_events(place):
            found.events.append(place)
    if not found.events and named:
        found.missing.append(
            f"TensorBoard: {cut(str(named))}, which the checkpoint names, is not here"
        )


def _has_events(folder: Path) -> bool:
    try:
        return any(folder.glob("*tfevents*"))
    except (OSError, ValueError):  # a name that no folder has
        return False
