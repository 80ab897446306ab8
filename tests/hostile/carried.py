"""Is what was planted still in what a command wrote? Pickles are walked, never loaded."""

import contextlib
import io
import pickletools
import re
import zipfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

from tests.hostile import pickles, watch

_STORAGES = ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool",
             "ComplexFloat", "ComplexDouble")  # fmt: skip
_KNOWN: set[str] = set()  # names in pickles that healthy runs write


def learn(folder: Path) -> None:
    """Take the names in the pickles of a healthy output as those that may be there."""
    for _, name in _names_below(folder):
        _KNOWN.add(name)


def found(folder: Path) -> list[str]:
    """Return what an output must not have: other names in pickles, code in pages, other flags."""
    faults = [
        f"{path} carries {name[:80]!r}"
        for path, name in _names_below(folder)
        if name not in _KNOWN and not _is_dtype(name)
    ]
    for path in folder.rglob("*.html"):
        page = _Page()
        page.feed(path.read_text(errors="replace"))
        faults += [f"{path.name} has {word}" for word in page.code]
    return faults


def _is_dtype(name: str) -> bool:
    """Whether a name is a dtype's or a storage's of torch: what tensors of that dtype need."""
    module, _, word = name.partition(" ")
    storage = word.endswith("Storage") and word.removesuffix("Storage") in _STORAGES
    return module == "torch" and (storage or watch.is_dtype(module, word))


def _names_below(folder: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not path.is_file():
            continue
        if path.name == ".metadata":
            yield from ((path.name, name) for name in names(path.read_bytes()))
        elif path.suffix in (".pt", ".distcp"):
            for data in _pickles(path.read_bytes()):
                yield from ((path.name, name) for name in names(data))


def _pickles(data: bytes) -> Iterator[bytes]:
    """Yield the data.pkl of every archive in a file, found by its first bytes."""
    starts = [
        match.start()
        for match in re.finditer(rb"PK\x03\x04.{26}[^/]{1,40}/data\.pkl", data, re.DOTALL)
    ]
    place = 0
    for begin in starts:
        if begin < place:  # in a tensor's bytes, which nobody opens as an archive
            continue
        place, archive = _whole(data, begin, [*starts, len(data)])
        with archive:
            yield archive.read(next(n for n in archive.namelist() if n.endswith("/data.pkl")))


def _whole(data: bytes, begin: int, ends: list[int]) -> tuple[int, zipfile.ZipFile]:
    """Return the archive that begins there, and where what follows it begins."""
    for end in ends:
        if end > begin:
            with contextlib.suppress(zipfile.BadZipFile):
                archive = zipfile.ZipFile(io.BytesIO(data[begin:end]))
                if min(info.header_offset for info in archive.infolist()) == 0:
                    return end, archive
    raise zipfile.BadZipFile(f"the archive at byte {begin} has no end")


def names(data: bytes) -> Iterator[str]:
    """Yield every name that a pickle would import, as MODULE NAME."""
    texts: list[str | None] = [None]
    memo: dict[int, str | None] = {}
    for code, argument, _ in pickletools.genops(data):
        if code.name in ("GLOBAL", "INST"):
            yield str(argument)
        elif code.name == "STACK_GLOBAL":
            yield " ".join(str(word) for word in texts[-2:])
        elif code.name.startswith("EXT"):
            yield f"extension {argument}"
        elif code.name == "MEMOIZE":
            memo[len(memo)] = texts[-1]
        elif code.name in ("BINPUT", "LONG_BINPUT", "PUT"):
            memo[int(argument)] = texts[-1]
        elif code.name in ("BINGET", "LONG_BINGET", "GET"):
            texts.append(memo.get(int(argument)))
        else:  # what else is pushed is no name
            texts.append(argument if isinstance(argument, str) else None)


class _Page(HTMLParser):
    """Collects what would run or be fetched when a page is opened."""

    def __init__(self) -> None:
        super().__init__()
        self.code: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "iframe", "object", "embed", "svg", "link", "base", "form", "a"):
            self.code.append(f"<{tag}>")
        for name, value in attrs:
            if name.startswith("on") or (pickles.MARK in (value or "") and name in ("src", "href")):
                self.code.append(f"<{tag} {name}>")
            if name == "src" and not (value or "").startswith("data:"):
                self.code.append(f"<{tag} {name}>")
