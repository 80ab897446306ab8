"""Which state of the sources this is: a hash of all Python files, of the plugin or of a folder."""

import hashlib
import os
from functools import cache
from pathlib import Path

_PLUGIN = Path(__file__).parent
# Files of users: links in a checkout, a folder in an installed package.
_NOT_CODE = os.path.join("commands", "recipes", "files")


@cache
def of_plugin() -> str:
    """Return a hash of the plugin's own sources, 12 hexadecimal digits."""
    return hash_of(_PLUGIN, content=True)


def hash_of(folder: Path, content: bool) -> str:
    """Return a hash of the Python files below a folder: their names with their bytes or sizes."""
    found = hashlib.sha256()
    # Of text, not of Paths: every rank does this at its start, for a thousand files.
    top = str(folder)
    left_out = os.path.join(top, _NOT_CODE)
    for root, folders, names in os.walk(top):
        folders[:] = sorted(
            f for f in folders if f != "__pycache__" and os.path.join(root, f) != left_out
        )
        below = root[len(top) :].lstrip(os.sep)
        for name in sorted(name for name in names if name.endswith(".py")):
            file = os.path.join(root, name)
            found.update(f"{os.path.join(below, name)}\0".encode())
            found.update(_bytes(file) if content else str(os.stat(file).st_size).encode())
    return found.hexdigest()[:12]


def _bytes(file: str) -> bytes:
    with open(file, "rb") as opened:
        return opened.read()
