"""One case: a healthy folder is laid, one file of it replaced, a command run in a forked child.

SANDBOX/in        the folders that the command is given        nobody may change them
SANDBOX/outside   what hostile names lead to                   nobody may change it
SANDBOX/home      HOME, and what is cached there               may be written
SANDBOX/tmp       TMPDIR; must be empty again afterwards        may be written
SANDBOX/out       for what the command writes                  may be written
SANDBOX/cwd       where the command runs                       nobody may change it
"""

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

from tests.hostile import carried, classes, plants, trees, watch
from tests.hostile.inside import ESCAPES

SECONDS = 45  # of the clock; on a busy machine much less of the processor
MEMORY = 3 << 30  # of address space above what is there when a case begins: files are mapped too
OUTPUT = 1 << 20  # bytes that a command may print
FOLDERS = ("in", "outside", "home", "tmp", "out", "cwd")


@dataclass
class Verdict:
    """How a case ended. Each list must be empty."""

    command: str
    plant: str = ""
    code: int | None = None
    seconds: float = 0.0
    said: str = ""
    executions: list[str] = field(default_factory=list)
    writes: list[str] = field(default_factory=list)
    hangs: list[str] = field(default_factory=list)
    tracebacks: list[str] = field(default_factory=list)
    silent: list[str] = field(default_factory=list)  # refused, and not in one sentence

    def faults(self) -> dict[str, list[str]]:
        kinds = ("executions", "writes", "hangs", "tracebacks", "silent")
        return {kind: found for kind in kinds if (found := getattr(self, kind))}


@dataclass
class Sandbox:
    """Folders of a case below `root`, and the healthy ones in `store`."""

    root: Path
    store: Path
    allowed: dict[str, frozenset[tuple[str, str]]] = field(default_factory=dict)
    opened: dict[str, set[str]] = field(default_factory=dict)

    def lay(self, command: trees.Command) -> None:
        for name in FOLDERS:
            path = self.root / name
            if path.is_symlink() or path.is_file():
                path.unlink()
            elif path.exists() and name != "home":  # caches stay: fonts of matplotlib
                shutil.rmtree(path)
            if name != "outside":
                path.mkdir(exist_ok=True)
        plants.outside_folder(self.root / "outside")
        for name in command.folders:
            shutil.copytree(self.store / name, self.root / "in" / name, symlinks=True)

    def words(self, words: tuple[str, ...]) -> list[str]:
        return [w.format(i=self.root / "in", o=self.root / "out") for w in words]

    def files(self, command: trees.Command) -> list[tuple[Path, str]]:
        """Return every file of a command and its kind."""
        found = [(p, kind) for pattern, kind in command.files.items()
                 for p in sorted((self.root / "in").glob(pattern))]  # fmt: skip
        return list(dict(found).items())

    def learn(self, only: str = "") -> None:
        """Run every command on healthy folders: what it does is allowed, what it opens kept.

        `only`: those whose name has these words.
        """
        for name, command in {**trees.COMMANDS, **trees.OTHERS}.items():
            if only not in name:
                continue
            self.lay(command)
            verdict, seen, opened = self._run(name, command, frozenset())
            if verdict.code != 0 or verdict.tracebacks:
                raise AssertionError(f"{name}: exit code {verdict.code}: {verdict.said}")
            if sockets := [act for act in seen if act[0] in watch.SOCKETS]:
                raise AssertionError(f"{name} uses the network: {sockets}")
            started = [act for act in seen if act[0] in watch.STARTS]
            if started and name in trees.COMMANDS:  # its work would be out of sight
                raise AssertionError(f"{name} starts a process: {started}")
            self.allowed[name] = frozenset(map(tuple, seen))  # type: ignore[arg-type]
            inside = str(self.root / "in") + os.sep
            self.opened[name] = {p.removeprefix(inside) for p in opened if p.startswith(inside)}
            carried.learn(self.root / "out")
        # What any healthy run imports, another one may; and acts of the same command alone.
        imports = frozenset(act for acts in self.allowed.values() for act in acts
                            if act[0] in ("import", "code.__new__",
                            "function.__new__"))  # fmt: skip
        self.allowed = {name: acts | imports for name, acts in self.allowed.items()}

    def run(self, name: str, rng: random.Random) -> Verdict:
        """Plant something in one file of the command, and return how it ended."""
        command = trees.COMMANDS[name]
        self.lay(command)
        path, kind = rng.choice(self.files(command))
        if rng.random() < 0.06:
            label = plants.beside(rng, path.parent, self.root / "outside")
        else:
            label = plants.plant(rng, path, kind, self.root / "outside")
        verdict, _, _ = self._run(name, command, self.allowed[name])
        verdict.plant = f"{path.relative_to(self.root / 'in')}: {label}"
        return verdict

    def _run(
        self, name: str, command: trees.Command, allowed: frozenset[tuple[str, str]]
    ) -> tuple[Verdict, list[tuple[str, str]], list[str]]:
        # Where the path of an output leads is where the user wants it, also through a link.
        named = [Path(os.path.realpath(word)) for word in self.words(command.writes)]
        writable = (*named, self.root / "home", self.root / "tmp")
        before = watch.listing(self.root, writable)
        verdict = Verdict(name)
        report = self.root.parent / "report.json"
        report.unlink(missing_ok=True)
        start = time.monotonic()
        streams = [self.root.parent / "stdout", self.root.parent / "stderr"]
        pid = os.fork()
        if pid == 0:
            _child(self, self.words(command.argv), watch.Watch(writable, allowed), report, streams)
        verdict.code = _wait(pid, verdict)
        verdict.seconds = time.monotonic() - start
        out, err = (stream.read_bytes().decode(errors="replace") for stream in streams)
        seen, opened = json.loads(report.read_text()) if report.exists() else ([], [])
        # Whether a file can be written is tried with one beside it; one that stays is listed below.
        tried = tuple(f"{path.parent}/tmp" for path in writable)
        for what, words in seen:
            if what.startswith("write") and str(words).startswith(tried):
                continue
            (verdict.writes if what.startswith("write") else verdict.executions).append(
                f"{what} {words}"
            )
        if verdict.code is not None and verdict.code >= 0 and not report.exists():
            verdict.executions.append("the process ended by other means than its main function")
        verdict.writes += watch.differences(before, watch.listing(self.root, writable))
        verdict.writes += [f"left: {path}" for path in watch.listing(self.root / "tmp")]
        if not name.startswith("apply"):  # it prints the script
            verdict.executions += carried.found(self.root / "out")
        _judge(verdict, out, err)
        if verdict.code and (self.root / "out" / "out").exists():
            verdict.writes.append("a refused conversion left its output")
        return verdict, [tuple(act) for act in seen], opened


def _child(
    sandbox: Sandbox, argv: list[str], watched: watch.Watch, report: Path, streams: list[Path]
) -> None:
    code = 70
    try:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, stream in enumerate(streams, start=1):
            os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.chdir(sandbox.root / "cwd")
        os.environ |= {"HOME": str(sandbox.root / "home"), "TMPDIR": str(sandbox.root / "tmp")}
        tempfile.tempdir = None  # asked for before
        sys.path.append(str(sandbox.root / "outside"))
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        watched.install()
        state = classes.state()
        try:
            with watched.on():
                code = trees.main(argv)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        except BaseException:
            traceback.print_exc()
            code = 99
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
        seen = watched.seen + [("class", text) for text in classes.changes(state)]
        report.write_text(json.dumps([seen, sorted(watched.opened)]))
    finally:
        os._exit(code & 255)


def _wait(pid: int, verdict: Verdict) -> int | None:
    """Return the exit code, negative for a signal; a case that takes too long is killed."""
    end = time.monotonic() + SECONDS
    pause = 0.001
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)  # what it left behind
                verdict.executions.append("a process was left behind")
            return os.waitstatus_to_exitcode(status)
        time.sleep(pause)
        pause = min(0.02, pause * 1.5)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    verdict.hangs.append(f"no end after {SECONDS} s")
    return None


def _judge(verdict: Verdict, out: str, err: str) -> None:
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.strip()]
    verdict.said = lines[-1][:300] if lines else ""
    if "Traceback (most recent call last)" in err:
        where = next((line for line in reversed(lines) if line.startswith("  File")), "")
        verdict.tracebacks.append(f"{verdict.said} {where.strip()[-120:]}")
    elif verdict.code is not None and verdict.code < 0:
        verdict.tracebacks.append(f"ended by signal {-verdict.code}")
    elif verdict.code not in (0, 1, 2, None):
        verdict.tracebacks.append(f"exit code {verdict.code}")
    if len(out) + len(err) > OUTPUT:
        verdict.silent.append(f"{len(out) + len(err)} bytes were printed")
    if verdict.code == 2 and "error: " not in verdict.said:
        verdict.silent.append(f"exit code 2 without a sentence: {verdict.said}")
    if ESCAPES.search(out + err):
        verdict.silent.append("an escape sequence of the file's was printed")
    if verdict.code == 1 and not (lines or out.strip()):
        verdict.silent.append("exit code 1 without a word")


def case_of(seed: int, number: int) -> tuple[str, random.Random]:
    """Return the command of a case and where its draws come from."""
    rng = random.Random(f"{seed}/{number}")
    names = list(trees.COMMANDS)
    weights = [trees.COMMANDS[name].weight for name in names]
    return rng.choices(names, weights)[0], rng
