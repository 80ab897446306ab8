"""`manifest.json`: what a converted checkpoint consists of, and whether it still does."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ep_plugin import __version__
from ep_plugin.checkpoint.tensors import NewObject, NewTensor
from ep_plugin.errors import ConfigError

NAME = "manifest.json"


def seal(
    folder: Path,
    hashed: dict[str, dict[str, Any]],
    content: Iterable[NewTensor | NewObject],
    settings: dict[str, Any],
) -> None:
    """Write the manifest of all files under `folder`; `hashed` has hashes that are known.

    Files: {name: {num_bytes, sha256}}; tensors: {name: {dtype, shape}}.
    """
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    tensors = {
        entry.name: {"dtype": str(entry.info.dtype), "shape": list(entry.info.shape)}
        for entry in content
        if isinstance(entry, NewTensor)
    }
    files = {name: hashed.get(name) or _digest(folder / name) for name in names}
    manifest = {"ep_plugin": __version__, "settings": settings, "files": files, "tensors": tensors}
    (folder / NAME).write_text(json.dumps(manifest, indent=1) + "\n")


def check(folder: Path) -> list[str]:
    """Return what is wrong with the files under `folder`; empty when each is as it was written.

    Raises ConfigError where there is no manifest.
    """
    try:
        files = json.loads((folder / NAME).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{folder} has no readable {NAME} ({error}); give a folder that convert wrote"
        ) from error
    return [problem for name, entry in files.items() if (problem := _problem(folder / name, entry))]


def _problem(path: Path, entry: dict[str, Any]) -> str | None:
    if not path.is_file():
        return f"{path} is missing"
    size = path.stat().st_size
    if size != entry["num_bytes"]:
        return f"{path} has {size} bytes instead of {entry['num_bytes']}"
    return None if _digest(path) == entry else f"{path} has other bytes than were written"


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"num_bytes": path.stat().st_size, "sha256": digest}
