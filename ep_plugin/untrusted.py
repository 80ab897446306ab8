"""What comes from a file that somebody else wrote: read in bounds, and shown in bounds.

    read_json(path, remedy)     a JSON file, of one kind: object or list
    parse_json(text, ...)       the same of text that lies within another file
    read_text, read_bytes       a file of limited size
    cut, shown, one_line        names, values and whole messages for a reader

JSON is refused where it is larger than `max_bytes`, deeper than MAX_DEPTH, has more than
MAX_CONTAINERS objects and lists, has a key twice, NaN, infinity, or a whole number beyond 64 bits:
what is returned can be compared, summed and printed.
"""

import argparse
import contextlib
import itertools
import json
import os
import re
import reprlib
import stat
from collections import deque
from collections.abc import Callable
from math import isfinite
from pathlib import Path
from types import NoneType
from typing import Any

from ep_plugin.errors import BRACKET, ConfigError, long_words_cut

MAX_BYTES = 8 << 20  # of a JSON or text file, unless its reader says more
MAX_DEPTH = 64
MAX_CONTAINERS = 1_000_000
SHOWN = 60  # characters of a value in a message
_LONGEST = 200  # characters of a name or another text in a message
_STRING = re.compile(r'"(?:[^"\\]|\\.)*+"?')
_NO_BRACKET = re.compile(r"[^\[\]{}]+")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_ONE_KIND = str.maketrans("{}", "[]")


def read_json(
    path: Path,
    remedy: str,
    kind: type[Any] = dict,
    max_bytes: int = MAX_BYTES,
    by_hand: bool = False,
) -> Any:
    """Return what the JSON file at `path` holds: an object, or a list with `kind=list`.

    Raises ConfigError that names the file, ends with `remedy`, and is one sentence. `by_hand`: the
    remedy for one wrong value is to correct that.
    """
    correct = f"correct that key in {path.name}" if by_hand else remedy
    return parse_json(read_text(path, remedy, max_bytes), str(path), remedy, kind, correct)


def parse_json(
    text: str, where: str, remedy: str, kind: type[Any] = dict, correct: str = ""
) -> Any:
    """Return what JSON text says; `where` names it in the ConfigError for text that is refused.

    `correct`: the remedy for one wrong value; "": the same.
    """
    try:
        value = _parse(text)
    except _WrongValue as error:
        raise ConfigError(
            f"{where} cannot be read ({cut(_of_key(text))}{cut(str(error))}); {correct or remedy}"
        ) from error
    except RecursionError:
        raise ConfigError(
            f"{where} cannot be read (it nests deeper than {MAX_DEPTH}); {remedy}"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{where} cannot be read ({cut(str(error))}); {remedy}") from error
    if type(value) is not kind:
        word = "list" if kind is list else "object"
        raise ConfigError(f"{where} holds no JSON {word}; {remedy}")
    return value


def read_text(path: Path, remedy: str, max_bytes: int = MAX_BYTES) -> str:
    """Return the text of a file, as UTF-8. Raises ConfigError as `read_bytes` does."""
    content = read_bytes(path, remedy, max_bytes)
    try:
        return content.decode("utf-8-sig")  # some editors write a mark of UTF-8 first
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} cannot be read ({error}); {remedy}") from error


def read_bytes(path: Path, remedy: str, max_bytes: int = MAX_BYTES) -> bytes:
    """Return the bytes of a file, or of what a symbolic link leads to.

    Raises ConfigError for what is missing, no file (a pipe is not waited for), or larger.
    """
    try:
        check_regular(path, remedy)
        with path.open("rb") as stream:
            content = stream.read(max_bytes + 1)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({reason(error)}); {remedy}") from error
    if len(content) > max_bytes:
        raise ConfigError(
            f"{path} has more than {max_bytes} bytes, which no file of its kind needs; {remedy}"
        )
    return content


def check_regular(path: Path, remedy: str) -> os.stat_result:
    """Return what the system says of a file; raises ConfigError for a pipe, device or folder.

    Raises OSError where there is nothing.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ConfigError(f"{path} is no regular file; {remedy}")
    return found


def reason(error: Exception) -> str:
    """Return why something failed, without the file's name, which a message has already."""
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def cut(text: str, longest: int = _LONGEST) -> str:
    """Return a name or value for a message: on one line, without what a terminal would obey."""
    text = text if len(text) <= longest else f"{text[:longest]}... ({len(text)} characters)"
    return text if text.isprintable() else "".join(map(_printable, text))


def shown(value: object) -> str:
    """Return any value for a ConfigError: on one line, cut, and with its type if that is rare.

    What lies deep in it is left out, so the time is bounded whatever it holds.
    """
    try:
        text = _SHORT.repr(value)
    except Exception:  # an object of any kind
        text = f"<{type(value).__name__}>"
    text = cut(" ".join(text.split()), len(text))
    if len(text) > SHOWN:
        text = f"{text[: SHOWN // 2]}...{text[-SHOWN // 2 :]}"
    text, kind = text.replace("<", BRACKET), type(value)
    if kind in _PLAIN:
        return text
    return f"{text} ({kind.__module__}.{kind.__qualname__})"


class _Short(reprlib.Repr):
    """Python's short spelling, also of containers whose own spelling has no bounds."""

    def repr_instance(self, value: Any, level: int) -> str:
        if isinstance(value, dict):
            return self.repr_dict(value, level)
        if isinstance(value, (list, tuple, set, frozenset, deque)):
            return self.repr_list(list(itertools.islice(value, 10)), level)
        if isinstance(value, argparse.Namespace):
            return self.repr_dict(vars(value), level)
        if isinstance(value, (bytes, bytearray)):
            return repr(bytes(value[:SHOWN]))
        return super().repr_instance(value, level)


_PLAIN = (NoneType, bool, int, float, complex, str, bytes, list, tuple, dict, set)
_SHORT = _Short(maxlevel=3, maxstring=SHOWN, maxother=SHOWN, maxlong=SHOWN)


def one_line(message: str) -> str:
    """Return a message on one line, its longest words cut."""
    return cut(long_words_cut(message), len(message))


def printable(text: str) -> str:
    """Return a text in which what does not print, also a new line, is spelled out."""
    return "".join(map(_printable, text))


def _printable(character: str) -> str:
    return character if character.isprintable() else ascii(character)[1:-1]


class _WrongValue(ValueError):
    """JSON, but a value that nothing here can mean."""


def _of_key(text: str) -> str:
    """Return "under KEY, " for the first key with a wrong number in it; "" where there is none."""
    found: list[str] = []

    def wrong(parse: Callable[[str], Any]) -> Callable[[str], Any]:
        def parsed(word: str) -> Any:
            try:
                return parse(word)
            except _WrongValue:
                return _WrongValue

        return parsed

    def is_wrong(value: Any) -> bool:
        return value is _WrongValue or (type(value) is list and any(map(is_wrong, value)))

    def remember(pairs: list[tuple[str, Any]]) -> None:
        found.extend(name for name, value in pairs if is_wrong(value))

    with contextlib.suppress(ValueError, RecursionError):  # of what follows after it
        json.loads(
            text,
            object_pairs_hook=remember,
            parse_constant=wrong(_no_constant),
            parse_int=wrong(_small_int),
            parse_float=wrong(_finite_float),
        )
    return f"under {cut(repr(found[0]))}, " if found else ""


def _parse(text: str) -> Any:
    """Return what JSON text says; raises ValueError or RecursionError."""
    containers = text.count("[") + text.count("{")
    if containers > MAX_CONTAINERS:
        raise ValueError(f"it has more than {MAX_CONTAINERS} objects and lists")
    value = json.loads(
        text,
        object_pairs_hook=_without_duplicates,
        parse_constant=_no_constant,
        parse_int=_small_int,
        parse_float=_finite_float,
    )
    if containers > MAX_DEPTH and _is_deep(text):
        raise RecursionError
    if _SURROGATE.search(text):  # half a character, which nothing can print
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _is_deep(text: str) -> bool:
    """Whether text that is JSON nests deeper than MAX_DEPTH."""
    brackets = _NO_BRACKET.sub("", _STRING.sub("", text)).translate(_ONE_KIND)
    for _ in range(MAX_DEPTH):
        brackets = brackets.replace("[]", "")  # the innermost ones
    return bool(brackets)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise _WrongValue(f"it has twice the key {cut(repr(twice))}")
    return found


def _no_constant(word: str) -> None:
    raise _WrongValue(f"it has the number {word}")


def _small_int(digits: str) -> int:
    if len(digits) < 19:
        return int(digits)
    value = int(digits) if len(digits) < 30 else 1 << 64
    if not -(1 << 63) <= value < 1 << 63:
        raise _WrongValue(f"it has the number {cut(digits, 30)}, which needs more than 64 bits")
    return value


def _finite_float(digits: str) -> float:
    value = float(digits)
    if not isfinite(value):
        raise _WrongValue(f"it has the number {cut(digits, 30)}, which is infinite")
    return value
