"""Which iteration of a checkpoint: the tracker file that all of Megatron's formats have."""

from collections.abc import Callable
from pathlib import Path

from ep_plugin.errors import ConfigError

TRACKER = "latest_checkpointed_iteration.txt"


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
    word = tracker.read_text(errors="replace").strip()
    if word != "release" and not word.isdecimal():
        raise ConfigError(f"{tracker} must hold an iteration number or 'release'; got {word!r}")
    folder = path / (word if word == "release" else f"iter_{int(word):07d}")
    if not folder.is_dir():
        raise ConfigError(
            f"{tracker} names {folder.name}, which {path} does not have; "
            "give one of its iteration folders instead"
        )
    return folder
