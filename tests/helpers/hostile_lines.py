"""Command lines of every kind, as hypothesis strategies, made from the parsers themselves.

`lines()` draws the words behind `ep-plugin`; `run` has a line run in this process and returns how
it ended. What takes minutes (measuring, runs of a script) is left out by `without_work`.
"""

import argparse
import contextlib
import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

from hypothesis import strategies as st

from ep_plugin import cli

COMMANDS = tuple(name for name in cli.COMMANDS if name != "run")
# Names of files are those that `fill` makes, or lie where nothing can be written: some lines run.
PATHS = (
    *(
        "taken",
        "folder",
        "missing",
        "taken/below",
        "folder/../x",
        "link",
        "pipe",
        "folder/new.json",
    ),
    *("/dev/full", "/dev/null", "/proc/self/x", "x" * 300, "x/" * 3000, "a\nb", "\udc80", "~", "é"),
    *(
        "new.png",
        "new.json",
        "new",
        "<script>",
        ".",
        "empty.json",
        "deep.json",
        "nan.json",
        "text.py",
    ),
    *("deep.py", "null.py", "bom.py", "latin.py"),
)
WORDS = (
    *(
        "",
        "x",
        "x" * 5000,
        "a\nb",
        "\udc80",
        "é",
        "0",
        "-1",
        "1",
        "2",
        "8",
        str(10**9),
        str(10**30),
    ),
    *("9" * 5000, "nan", "inf", "-inf", "1e309", "1e-400", "1.5", "0x10", "1_000", "٣", "<topk>"),
    *("{args}", "%s", "$HOME", "a=b", "ep=2", f"tp=2,ep={'9' * 50}", "[1]*1000000000", "-", "--"),
    *("None", "true", "@missing", "a.b", "..", "all", "every:0", "0-999999999", "--nope", "-h"),
)


def actions(command: str) -> list[argparse.Action]:
    """Return what the parser of a command takes, but for --help."""
    return [action for action in _parser(command)._actions if action.dest != "help"]


@cache
def _parser(command: str) -> argparse.ArgumentParser:
    parser = cli.build_parser(command)
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    found: argparse.ArgumentParser = commands.choices[command]
    return found


@cache
def _values(action: argparse.Action) -> st.SearchStrategy[str]:
    odd = st.one_of(st.sampled_from(WORDS), st.sampled_from(PATHS), st.text(max_size=8))
    legal = list(map(str, action.choices or ()))
    if action.type is int:
        legal += ["1", "2", "4"]
    if action.type is float:
        legal += ["1.0", "0.5"]
    if action.dest == "bench":
        legal += ["layer", "gemm", "kernels", "overlap"]
    return st.one_of(odd, st.sampled_from(legal)) if legal else odd


@st.composite
def lines(draw: Any, command: str | None = None) -> list[str]:
    """A command and its words: what it requires, up to three options, and values of any kind."""
    name = command or draw(st.sampled_from(COMMANDS))
    every = actions(name)
    needed = [a for a in every if a.required or not a.option_strings]
    options = [action for action in every if action not in needed]
    chosen = [action for action in needed if action.required or draw(st.booleans())]
    if options:
        chosen += draw(st.lists(st.sampled_from(options), max_size=3, unique_by=id))
    words = [name]
    for action in chosen:
        if action.option_strings:
            words.append(action.option_strings[-1])
        if action.nargs == 0:
            continue
        count = 1 if action.nargs in (None, "?") else draw(st.integers(1, 2))
        # NUL cannot stand in the arguments of a process
        words += [draw(_values(action)).replace("\0", "") for _ in range(count)]
    return words


def fill(folder: Path) -> None:
    """Make the files that `PATHS` names in `folder`, in which lines are to run."""
    (folder / "folder").mkdir()
    for name, content in (
        *(("taken", b"x"), ("empty.json", b""), ("deep.json", b"[" * 100_000)),
        *(("nan.json", b"[NaN]"), ("text.py", b"print(1)\n"), ("deep.py", b"(" * 100_000)),
        *(("null.py", b"a\0b"), ("bom.py", b"\xef\xbb\xbfprint(1)\n"), ("latin.py", b"# \xff\n")),
    ):
        (folder / name).write_bytes(content)
    (folder / "link").symlink_to("nowhere")
    os.mkfifo(folder / "pipe")


@dataclass
class Ended:
    """How a line ended: its exit code, and what it wrote."""

    code: int
    out: str
    err: str

    @property
    def fault(self) -> str:
        """What is wrong with that; "" for an end that is right."""
        if "Traceback (most recent call last)" in self.err or self.code not in (0, 1, 2):
            return f"exit code {self.code}: {self.err[-3000:]}"
        if self.code != 2:
            return ""
        lines = self.err.splitlines()
        said = [i for i, line in enumerate(lines) if ": error: " in line]
        if said != [len(lines) - 1] or len(lines[-1]) > 3000:
            return f"no one sentence: {self.err[-3000:]}"
        return "" if len(lines) == 1 else f"more than one sentence: {self.err[-3000:]}"


def run(words: list[str]) -> Ended:
    """Run a line in the current folder."""
    out, err = (io.TextIOWrapper(io.BytesIO(), errors="backslashreplace") for _ in range(2))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main(words)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
    texts = []
    for stream in (out, err):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode(errors="replace"))  # type: ignore[attr-defined]
    return Ended(code, *texts)


@contextlib.contextmanager
def without_work() -> Iterator[None]:
    """Leave out what takes long once a line is accepted: measuring, runs, imports of packages."""
    import torch

    from ep_plugin.commands import bench, doctor, parity
    from ep_plugin.commands.bench.figures import make_row
    from ep_plugin.commands.bench.measure import Timing

    nothing: Callable[..., Any] = lambda *_, **__: []  # noqa: E731
    row = make_row(torch.device("cpu"), Timing(1.0, 1.0, 1.0), bench="gemm", shape="tiny", op="fc1")
    row |= {"backend": "ep_plugin", "precision": "bf16", "routing": "balanced", "floor_ms": 1.0}
    with (
        patch.object(bench, "_measure", lambda *_: ([row], [row])),
        patch.object(parity, "compare", nothing),
        patch.object(doctor, "examine", nothing),
    ):
        yield
