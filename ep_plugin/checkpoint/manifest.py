"""`manifest.json`: what a converted checkpoint consists of, and whether it still does.

{"ep_plugin": version, "settings": {...},
 "files": {name: {num_bytes, sha256}}, "tensors": {name: {dtype, shape}}}
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from ep_plugin import __version__
from ep_plugin.checkpoint.journal import file_digest
from ep_plugin.checkpoint.tensors import NewObject, NewTensor, TensorInfo
from ep_plugin.errors import ConfigError
from ep_plugin.untrusted import cut, read_json, shown

MANIFEST = "manifest.json"
_MAX_BYTES = 64 << 20  # about 250 bytes a tensor
_REMEDY = "give a folder that convert wrote"
_SHA256_LENGTH = 64


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
    files = {name: hashed.get(name) or file_digest(folder / name) for name in names}
    manifest = {"ep_plugin": __version__, "settings": settings, "files": files, "tensors": tensors}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def manifest_problems(folder: Path, below: str | None = None) -> list[str]:
    """Return what is wrong with the files under `folder`; empty when each is as it was written.

    `below`: only with those in its folder of that name, and with none where there is no manifest,
    or it lists none of them: a run saves further iterations beside a converted one.

    Nothing outside of `folder` is opened. Raises ConfigError where there is no manifest, or it is
    none that `seal` wrote.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder; {_REMEDY}")
    path = folder / MANIFEST
    if below is not None and not path.exists(follow_symlinks=False):
        return []
    if path.is_symlink():
        raise ConfigError(f"{path} is a symbolic link; {_REMEDY}")
    manifest = read_json(path, _REMEDY, max_bytes=_MAX_BYTES)
    files, _ = (_section(manifest, key, path) for key in ("files", "tensors"))
    listed = {
        name: _file(name, entry, path)
        for name, entry in files.items()
        if below is None or name.startswith(f"{below}/")
    }
    if not listed:
        return []
    problems = [p for name, entry in listed.items() if (p := _problem(folder, name, entry))]
    return [*problems, *_unlisted(folder, below, listed.keys())]


def tensor_problems(folder: Path, stored: dict[str, TensorInfo]) -> list[str]:
    """Return where the tensors that `folder` holds are not those that its manifest lists.

    Raises as `manifest_problems`.
    """
    path = folder / MANIFEST
    tensors = _section(read_json(path, _REMEDY, max_bytes=_MAX_BYTES), "tensors", path)
    problems = [
        f"tensor {cut(name)} is in {folder}, and {MANIFEST} does not list it"
        for name in sorted(stored.keys() - tensors.keys())
    ]
    for name, entry in tensors.items():
        if name not in stored:
            problems.append(f"tensor {cut(name)} is in {MANIFEST}, and {folder} does not hold it")
            continue
        found = {"dtype": str(stored[name].dtype), "shape": list(stored[name].shape)}
        if entry != found:
            problems.append(
                f"tensor {cut(name)} is {found['dtype']} {found['shape']}, and {MANIFEST} lists it "
                f"as {shown(entry)}"
            )
    return problems


def _section(manifest: dict[str, Any], key: str, path: Path) -> dict[str, Any]:
    found = manifest.get(key)
    if not isinstance(found, dict) or not found:
        raise ConfigError(f"{path} lists no {key}; {_REMEDY}")
    return found


def _file(name: str, entry: Any, path: Path) -> dict[str, Any]:
    """Return what is listed of a file; raises ConfigError unless it can be one below the folder."""
    parts = PurePosixPath(name).parts
    if not parts or name != "/".join(parts) or {"/", ".."} & {*parts} or "\0" in name:
        raise ConfigError(f"{path} lists {shown(name)}, which is no file below it; {_REMEDY}")
    if (
        not isinstance(entry, dict)
        or entry.keys() != {"num_bytes", "sha256"}
        or type(entry["num_bytes"]) is not int
        or not isinstance(entry["sha256"], str)
        or len(entry["sha256"]) != _SHA256_LENGTH
    ):
        raise ConfigError(
            f"{path} lists {shown(name)} as {shown(entry)}, without num_bytes and sha256; {_REMEDY}"
        )
    return entry


def _problem(folder: Path, name: str, entry: dict[str, Any]) -> str | None:
    path = folder / name
    for part in [path, *path.parents][: len(PurePosixPath(name).parts)]:
        if part.is_symlink():
            return f"{cut(str(part))} is a symbolic link"
    if not path.is_file():
        return f"{cut(str(path))} is missing"
    size = path.stat().st_size
    if size != entry["num_bytes"]:
        return f"{path} has {size} bytes instead of {entry['num_bytes']}"
    return None if file_digest(path) == entry else f"{path} has other bytes than were written"


def _unlisted(folder: Path, inside: str | None, listed: Iterable[str]) -> Iterator[str]:
    """Yield what lies in the folder and is not listed; links are not followed."""
    known = {MANIFEST, *listed}
    for below, folders, names in (folder / (inside or "")).walk():
        for name in [*names, *(name for name in folders if (below / name).is_symlink())]:
            path = below / name
            if str(path.relative_to(folder)) not in known:
                yield f"{cut(str(path))} is not in {MANIFEST}"
