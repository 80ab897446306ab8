"""Which state of the sources this is: a hash of all Python files, of the plugin or of a folder."""

import hashlib
import os
from functools import cache
from pathlib import Path

_PLUGIN = Path(__file__).parent
# Files of users: links in a checkout, a folder in an installed package.
_NOT_CODE = Path("commands", "recipes", "files")


@cache
def of_plugin() -> str:
    """Return a hash of the plugin's own sources, 12 hexadecimal digits."""
    return hash_of(_PLUGIN, content=True)


def hash_of(folder: Path, content: bool) -> str:
    """Return a hash of the Python files below a folder: their names with their bytes or sizes."""
    found = hashlib.sha256()
    for root, folders, names in os.walk(folder):
        here = Path(root).relative_to(folder)
        folders[:] = sorted(f for f in folders if f != "__pycache__" and here / f != _NOT_CODE)
        for name in sorted(name for name in names if name.endswith(".py")):
            file = Path(root) / name
            found.update(f"{file.relative_to(folder)}\0".encode())
            found.update(file.read_bytes() if content else str(file.stat().st_size).encode())
    return found.hexdigest()[:12]
