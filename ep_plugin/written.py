"""Files that are written whole or not at all: beside their place, then renamed onto it.

A disk that is full or read-only, a folder that is a file, a name that is too long: each ends in a
ConfigError with the path and, where it matters, the disk; what was there before is still there.
"""

import contextlib
import errno
import os
import shutil
import stat
import tempfile
from io import BytesIO
from pathlib import Path
from typing import Any

from ep_plugin.errors import ConfigError
from ep_plugin.untrusted import cut, reason

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_OPEN_FILES = (Path("/dev/fd"), Path("/proc"))  # what is written there goes to an open file

_STANDARD = (Path("/dev/stdin"), Path("/dev/stdout"), Path("/dev/stderr"))


def write_whole(path: Path, content: str | bytes, follow: bool = True) -> None:
    """Write a file, and the folders above it. Raises ConfigError where that cannot be.

    A link to a file stays one, unless `follow` is False: then it is replaced, which is right in a
    folder that others made. A device or a pipe is written to as it is.
    """
    data = content.encode(errors="backslashreplace") if isinstance(content, str) else content
    try:
        target = Path(os.path.realpath(path)) if follow else path
        if follow and _is_no_file(path):
            with path.open("wb") as stream:
                stream.write(data)
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=target.parent, delete_on_close=False) as file:
            file.write(data)
            file.close()
            _like(target, file.name)
            os.replace(file.name, target)
    except (OSError, ValueError) as error:  # ValueError: half a character in a name
        raise ConfigError(cannot("written", path, error)) from error


def check_place(path: Path) -> None:
    """Raise ConfigError, before any work, where `write_whole` could not make a file at `path`.

    Nothing is left there, folders above it aside.
    """
    try:
        if path.is_dir():
            raise ConfigError(f"{cut(str(path))} is a folder; use the name of a file")
        if _is_no_file(path):
            return
        target = Path(os.path.realpath(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target.parent):
            pass
        with contextlib.suppress(FileNotFoundError):
            os.lstat(target)  # a name that is too long
    except (OSError, ValueError) as error:
        raise ConfigError(cannot("written", path, error)) from error


def check_picture(path: Path, flag: str) -> None:
    """Raise ConfigError, before any work, where `write_picture` could not make one at `path`."""
    check_place(path)
    from matplotlib.figure import Figure

    legal = Figure().canvas.get_supported_filetypes()
    if _kind(path) not in legal:
        raise ConfigError(f"{flag} {cut(str(path))} must end in .png, .svg or .pdf; use plot.png")


def write_picture(path: Path, figure: Any, dpi: int, follow: bool = True) -> None:
    """Write a matplotlib figure; the kind is that of the name's ending, or PNG."""
    picture = BytesIO()
    figure.savefig(picture, dpi=dpi, format=_kind(path))
    write_whole(path, picture.getvalue(), follow)


def cannot(done: str, path: object, error: Exception) -> str:
    """Return the sentence for a path that could not be read or `done` otherwise."""
    text, code = (
        f"{cut(str(path))} cannot be {done} ({reason(error)}",
        getattr(error, "errno", None),
    )
    if code == errno.EROFS:
        return f"{text}: the disk at {disk_of(str(path))}); use another disk, or mount it writable"
    if code in FULL:
        return (
            f"{text}, on the disk at {disk_of(str(path))}); free space there, or use another disk"
        )
    return f"{text}); use another path, or change its permissions"


def disk_of(path: str) -> str:
    """Return where the disk of a path is mounted."""
    place = os.path.realpath(path)
    while not os.path.ismount(place):
        place = os.path.dirname(place)
    return place


def _kind(path: Path) -> str:
    return path.suffix[1:].lower() or "png"


def _is_no_file(path: Path) -> bool:
    """Whether a path is a device, a pipe, or something else that is open already."""
    place = Path(os.path.abspath(path))
    if any(parent in _OPEN_FILES for parent in place.parents) or place in _STANDARD:
        return True
    if not path.exists() or path.is_dir():
        return False
    mode = path.stat().st_mode
    if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
        raise ConfigError(f"{cut(str(path))} is a pipe, which nobody may read; use a file")
    return not stat.S_ISREG(mode)


def _like(target: Path, new: str) -> None:
    """Give a new file the mode of the one it replaces, or that of any new file."""
    if target.is_file() and not target.is_symlink():
        shutil.copymode(target, new)
        return
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(new, 0o666 & ~mask)
