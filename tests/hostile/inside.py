"""Many cases in one process: readers, settings and parsers, called as the commands call them.

A reader may return, or raise ConfigError with one line. Whatever else happens is a fault.
"""

import contextlib
import io
import random
import re
import resource
import shutil
import signal
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ep_plugin.errors import ConfigError
from tests.hostile import classes, lines, not_whole, plants, readers, settings, watch

SECONDS = 20
MEMORY = 3 << 30
LONGEST = 4000  # characters of a sentence
ESCAPES = re.compile(r"[\x1b\x80-\x9f]")  # what a terminal would obey
Case = tuple[str, Callable[[], object]]  # what was planted, and the call that meets it


class Hang(BaseException):
    """A case took too long."""


@dataclass
class Bench:
    """One process, its hook, and what was counted."""

    folder: Path
    watched: watch.Watch = field(default_factory=watch.Watch)
    counts: dict[str, Counter[str]] = field(default_factory=dict)
    faults: list[dict[str, Any]] = field(default_factory=list)
    there: tuple[str, ...] = ()  # names in the folder `outside`
    state: list[Any] = field(default_factory=list)  # of classes that a pickle may name

    def run(self, kind: str, number: int, case: Case) -> None:
        """Make one call and count how it ends."""
        label, call = case
        row = self.counts.setdefault(kind, Counter())
        row["cases"] += 1
        self.watched.seen.clear()
        said = io.StringIO()
        found, ended = self._call(call, said)
        found += _escapes(said.getvalue())
        found += [("writes", name) for name in self._new_outside()]
        found += [("executions", text) for text in classes.changes(self.state)]
        for what, words in self.watched.seen:
            found.append(
                ("writes" if what.startswith("write") else "executions", f"{what} {words}")
            )
        row[ended] += 1
        row.update({name: 1 for name in {name for name, _ in found}})
        if found:
            fault = {"kind": kind, "number": number, "plant": label, "faults": found}
            self.faults.append(fault)

    def _new_outside(self) -> list[str]:
        """Return what a case left where hostile names lead to, removed, and of temporary files."""
        outside = self.folder / "outside"
        new = [path for path in outside.iterdir() if path.name not in (*self.there, "moved")]
        for path in new:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        if (outside / "file").read_text() != plants.LEFT_ALONE:
            new.append(outside / "file")
            (outside / "file").write_text(plants.LEFT_ALONE)
        return [str(path) for path in (*new, *(self.folder / "tmp").iterdir())]

    def _call(
        self, call: Callable[[], object], said: io.StringIO
    ) -> tuple[list[tuple[str, str]], str]:
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            with (
                contextlib.redirect_stdout(said),
                contextlib.redirect_stderr(said),
                self.watched.on(),
            ):
                code = call()
        except readers.Fault as fault:
            return [fault.args], "a result"
        except ConfigError as error:
            return _sentence(str(error)), "refused"
        except SystemExit as end:
            wrong = [] if end.code in (0, 2) else [("tracebacks", f"SystemExit({end.code!r})")]
            return wrong, "refused" if end.code else "a result"
        except Hang:
            return [("hangs", f"no end after {SECONDS} s")], "refused"
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{last.filename.rpartition('/ep_plugin/')[2]}:{last.lineno}"
            return [
                ("tracebacks", f"{type(error).__name__}: {str(error)[:200]} ({where})")
            ], "refused"
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        return [], "refused" if type(code) is int and code else "a result"


def _sentence(text: str) -> list[tuple[str, str]]:
    if "\n" in text or ESCAPES.search(text) or len(text) > LONGEST:
        return [("silent", f"{len(text)} characters, or several lines: {text[:100]!r}")]
    return []


def _escapes(text: str) -> list[tuple[str, str]]:
    found = ESCAPES.search(text)
    if found is None:
        return []
    return [("silent", f"printed an escape sequence: {text[max(0, found.start() - 50) :][:100]!r}")]


def _late(*_: Any) -> None:
    raise Hang


Changed = list[tuple[Path, Path]]  # (folder that was spoiled, healthy one)


def file_cases(
    folder: Path, kinds: dict[str, readers.Reader], changed: Changed
) -> Callable[[random.Random], Case]:
    """Return what makes a case: a file below `folder` is replaced until the next case."""
    sites = readers.sites(folder / "in", kinds)

    def make(rng: random.Random) -> Case:
        reader, path, kind = rng.choice(sites)
        name = laid(folder, path, changed)
        label = plants.plant(rng, path, kind, folder / "outside")
        return f"{reader.name} of {name}: {label}", lambda: reader.read(folder / "in")

    return make


def model_cases(folder: Path, changed: Changed) -> Callable[[random.Random], Case]:
    """Return what makes a case: another `.metadata`, by which a model may not be whole."""
    sites = readers.sites(folder / "in", readers.METADATA)

    def make(rng: random.Random) -> Case:
        reader, path, _ = rng.choice(sites)
        name = laid(folder, path, changed)
        label, data, whole = not_whole.edited(rng, folder / "outside", path.read_bytes())
        path.write_bytes(data)

        def call() -> object:
            code = reader.read(folder / "in")
            if code == 0 and not whole:
                raise readers.Fault("silent", "a model that is not whole is called fine")
            return code

        return f"{reader.name} of {name}: {label}", call

    return make


def laid(folder: Path, path: Path, changed: Changed) -> Path:
    """Mend what the case before spoiled, for one that spoils `path`; returns its short name."""
    while changed:
        readers.mend(*changed.pop())
    if (folder / "outside" / "moved").exists():
        shutil.rmtree(folder / "outside" / "moved")
    name = path.relative_to(folder / "in")
    changed.append((folder / "in" / name.parts[0], folder / "store" / name.parts[0]))
    return name


def kinds(folder: Path) -> dict[str, Callable[[random.Random], Case]]:
    """Return the kinds of cases, each with what makes one."""
    changed: Changed = []  # by any kind: they share the folders
    return {
        "pickles and archives": file_cases(folder, readers.PICKLES, changed),
        "JSON and text": file_cases(folder, readers.TEXTS, changed),
        "safetensors headers": file_cases(folder, readers.HEADERS, changed),
        "metadata of models": model_cases(folder, changed),
        "settings": settings.case,
        "command lines": lines.case,
    }


def run(
    folder: Path, cases: int, seed: int, seconds: float, only: str | None = None
) -> dict[str, Any]:
    """Run as many cases of each kind, or for so long; returns the counts and the faults."""
    plants.outside_folder(folder / "outside")
    there = tuple(path.name for path in (folder / "outside").iterdir())
    temporary = folder / "tmp"
    temporary.mkdir()
    tempfile.tempdir = str(temporary)
    bench = Bench(folder, watch.Watch(writable=(temporary,)), there=there)
    lines.learn()
    bench.watched.install()
    signal.signal(signal.SIGALRM, _late)
    made = {name: make for name, make in kinds(folder).items() if only is None or only in name}
    readers.learn(folder / "in", bench.watched)
    bench.state = classes.state()
    start = time.monotonic()
    with _memory():
        for number in range(cases // len(made)):
            if time.monotonic() - start > seconds:
                break  # with as many of each kind
            for name, make in made.items():
                bench.run(name, number, make(random.Random(f"{seed}/{name}/{number}")))
    return {"counts": bench.counts, "faults": bench.faults}


@contextlib.contextmanager
def _memory() -> Iterator[None]:
    """Bound the address space: what asks for more gets a MemoryError, which is a fault."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
