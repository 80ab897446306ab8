"""Which files of an unfinished conversion are whole: what is asked for, then a line for each file.

    [REQUEST, CHECK]
    [NAME, {"num_bytes", "sha256", "content"}, CHECK]

CHECK is a digest of what stands before it on its line. A last line without an end was being written
when the conversion was killed, and does not count.
"""

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ep_plugin.errors import ConfigError
from ep_plugin.untrusted import cut, parse_json, read_text, shown

FILE = "journal.jsonl"
_MAX_BYTES = 256 << 20  # about 250 bytes a tensor


@dataclass
class Journal:
    """The files that are whole, by name; `path` None keeps them in memory alone."""

    path: Path | None = None
    done: dict[str, Any] = field(default_factory=dict)

    def add(self, name: str, record: dict[str, Any]) -> None:
        """Remember a file, on disk before anything else is done."""
        self.done[name] = record
        if self.path is not None:
            with self.path.open("a") as stream:
                stream.write(_line(name, record))
                stream.flush()
                os.fsync(stream.fileno())


def open_journal(path: Path, request: dict[str, Any]) -> Journal:
    """Return the journal at `path`, a new one where there is none.

    Raises ConfigError when it is of another request, or does not say what was written.
    """
    text = read_text(path, _start_over(path), _MAX_BYTES) if _is_there(path) else ""
    whole = text[: text.rfind("\n") + 1].splitlines()
    lines = [_parsed(line, number, path) for number, line in enumerate(whole, 1)]
    old = lines[0][0] if lines else request
    _check_request(old, request, path)
    entries = [_entry(line, number, path) for number, line in enumerate(lines[1:], 2)]
    fresh = path.with_suffix(".new")
    fresh.unlink(missing_ok=True)
    fresh.write_text("".join([_line(old), *(_line(*entry) for entry in entries)]))
    fresh.replace(path)
    return Journal(path, dict(entries))


def file_digest(path: Path) -> dict[str, Any]:
    """Return the size and the hash of a file, as the journal and a manifest have them."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"num_bytes": path.stat().st_size, "sha256": digest}


def is_whole(path: Path, record: dict[str, Any] | None) -> bool:
    """Whether the journal has a file, and it has the bytes that were written."""
    if record is None or path.is_symlink() or not path.is_file():
        return False
    wanted = {key: record[key] for key in ("num_bytes", "sha256")}
    return path.stat().st_size == wanted["num_bytes"] and file_digest(path) == wanted


def _is_there(path: Path) -> bool:
    return path.is_symlink() or path.exists()


def _line(*values: Any) -> str:
    return json.dumps([*values, _check(values)]) + "\n"


def _check(values: tuple[Any, ...] | list[Any]) -> str:
    return hashlib.sha256(json.dumps(list(values)).encode()).hexdigest()[:16]


def _parsed(line: str, number: int, path: Path) -> list[Any]:
    """Return what a line says; raises ConfigError unless it is as it was written."""
    where = f"line {number} of {path}"
    values: list[Any] = parse_json(line, where, _start_over(path), list)
    if len(values) < 2 or values[-1] != _check(values[:-1]):
        raise ConfigError(
            f"{where} is damaged, or of another version of ep-plugin; {_start_over(path)}"
        )
    return values[:-1]


def _check_request(old: Any, request: dict[str, Any], path: Path) -> None:
    if not isinstance(old, dict):
        raise ConfigError(f"{path} does not say what was asked for; {_start_over(path)}")
    different = [key for key in {**old, **request} if old.get(key) != request.get(key)]
    if different:
        values = ", ".join(
            f"{cut(key)} was {shown(old.get(key))} and is {shown(request.get(key))}"
            for key in different
        )
        raise ConfigError(
            f"{path.parent} holds an unfinished conversion of another kind ({values}); repeat "
            "that command to finish it, or remove that folder to start anew"
        )


def _entry(line: list[Any], number: int, path: Path) -> tuple[str, dict[str, Any]]:
    name, record = line if len(line) == 2 else (None, None)
    if isinstance(name, str) and isinstance(record, dict):
        kinds = [type(record.get(key)) for key in ("num_bytes", "sha256")]
        if kinds == [int, str] and "content" in record:
            return name, record
    raise ConfigError(f"line {number} of {path} is of no file; {_start_over(path)}")


def _start_over(path: Path) -> str:
    return f"remove {path.parent} and repeat the command to start over"
