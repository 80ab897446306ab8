"""The project's readers by the files they open, for many cases in one process."""

import io
import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from ep_plugin.errors import ConfigError
from tests.hostile import carried, trees, watch


class Fault(Exception):
    """What a reader did and may not do: (kind of fault, words)."""


@dataclass(frozen=True)
class Reader:
    """What reads some files below the folder of inputs."""

    name: str
    read: Callable[[Path], object]
    files: dict[str, str]


def _opened(folder: str, output: Any, tensors: bool = True) -> Callable[[Path], object]:
    def read(root: Path) -> None:
        from ep_plugin.checkpoint.open import open_source

        source = open_source(root / folder, output).source
        for name in source.tensors if tensors else ():
            source.read_tensor(name)
        for name in source.objects if tensors else ():
            source.read_object(name)

    return read


def _command(*words: str) -> Callable[[Path], object]:
    def read(root: Path) -> object:
        """Return the exit code."""
        from ep_plugin.cli import build_parser

        argv = [word.format(i=root) for word in words]
        args = build_parser(argv[0]).parse_args(argv)
        return import_module(f"ep_plugin.commands.{argv[0]}").run(args)

    return read


def _converted(*words: str) -> Callable[[Path], object]:
    """Convert, and look at what was written, which goes again."""

    def read(root: Path) -> object:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            try:
                code = _command("convert", "--to", f"{folder}/out", *words)(root)
            except ConfigError:
                if left := [path.name for path in folder.iterdir()]:
                    raise Fault("writes", f"left by a refused conversion: {left}") from None
                raise
            if names := carried.found(folder):
                raise Fault("executions", f"in what was written: {names}")
            return code

    return read


def _summary(root: Path) -> None:
    from ep_plugin.commands.report.summary import measured

    measured(root / "run")


def _log(root: Path) -> None:
    from ep_plugin.commands.report import any_run

    any_run.read([root / "any"])


def _bench(root: Path) -> None:
    from ep_plugin.commands.bench.figures import read

    read(root / "files" / "bench.json")


def _prompts(root: Path) -> None:
    from ep_plugin.checkpoint.prompts import read_prompts

    read_prompts(root / "files" / "prompts.json", None)


def _flags(root: Path) -> None:
    from ep_plugin.megatron.arguments import flags_file

    flags_file.read(root / "moe" / "flags.txt", "model")


def _schedule(root: Path) -> None:
    from ep_plugin.megatron.arguments import flags_file

    flags_file.read(root / "files" / "schedule.txt", "schedule")


def _teacher(root: Path) -> None:
    from ep_plugin.megatron.distill.fits_student import check_teacher
    from tests.hostile.teacher import student

    check_teacher(student(str(root / "moe")))


def _tokenizer(place: Any, prompt: str) -> None:
    from ep_plugin.megatron.workers.tokenizer import load

    found = load(place)
    found.decode(found.encode(prompt))


def _pieces(root: Path) -> None:
    from ep_plugin.checkpoint.text import Place

    _tokenizer(Place("file or name", str(root / "pieces")), "experts are")


def _pairs(root: Path) -> None:
    from ep_plugin.checkpoint.text import Place

    folder = root / "pairs"
    files = (str(folder / name) for name in ("vocab.json", "merges.txt"))
    _tokenizer(Place("gpt2", *files), "experts are")


def _ticks(root: Path) -> None:
    from ep_plugin.checkpoint.text import Place

    sizes = {"vocab_size": 264, "num_special_tokens": 7}
    _tokenizer(Place("tiktoken", str(root / "ticks" / "words.json"), options=sizes), "MOE 8")


def _pick(files: dict[str, str], *kinds: str) -> dict[str, str]:
    return {pattern: kind for pattern, kind in files.items() if kind in kinds}


_BINARY = ("metadata", "archive", "chunks")
_RANKS = trees.COMMANDS["convert per-rank files"].files
_TEACHER = trees.COMMANDS["plan --ep-teacher"].argv
_PLAN = ("plan", "--topk", "4", "--ep", "2", "4", "--measured", "{i}/files/measured.json")
PICKLES: dict[str, Reader] = {
    reader.name: reader
    for reader in (
        Reader("open", _opened("dense", "megatron"), _pick(trees.torch_dist("dense"), *_BINARY)),
        Reader("open as plain", _opened("moe", "hf"), _pick(trees.torch_dist("moe"), *_BINARY)),
        Reader(
            "open older", _opened("old", "megatron"), _pick(trees.torch_dist("old", True), *_BINARY)
        ),
        Reader("open per-rank files", _opened("ranks", "megatron"), _pick(_RANKS, *_BINARY)),
        Reader("audit", _command("audit", "{i}/moe"), _pick(trees.torch_dist("moe"), *_BINARY)),
        Reader(
            "plan a teacher",
            _command(*_TEACHER),
            _pick(trees.COMMANDS["plan --ep-teacher"].files, *_BINARY),
        ),
        Reader("check a teacher", _teacher, _pick(trees.torch_dist("moe"), *_BINARY)),
        Reader("tokenizer", _pieces, {"pieces/tokenizer.model": "sentencepiece"}),
    )
}
TEXTS: dict[str, Reader] = {
    reader.name: reader
    for reader in (
        Reader(
            "open",
            _opened("dense", "megatron", False),
            _pick(trees.torch_dist("dense"), "json", "text"),
        ),
        Reader("open per-rank files", _opened("ranks", "megatron", False), _pick(_RANKS, "text")),
        Reader("open Hugging Face", _opened("hf", "megatron", False), _pick(trees.HF, "json")),
        Reader("open Hugging Face again", _opened("hf", "hf", False), {"hf/config.json": "json"}),
        Reader(
            "check",
            _command("convert", "--check", "--to", "{i}/moe"),
            {"moe/manifest.json": "json"},
        ),
        Reader("summary", _summary, _pick(trees.RUN, "json", "text")),
        Reader("log", _log, {"any/train.log": "text"}),
        Reader("plan", _command(*_PLAN), {"files/measured.json": "json"}),
        Reader("tokenizer", _pieces, {"pieces/*.json": "json"}),
        Reader("byte pairs", _pairs, {"pairs/vocab.json": "json", "pairs/merges.txt": "text"}),
        Reader("tiktoken", _ticks, {"ticks/words.json": "json"}),
        Reader("bench", _bench, {"files/bench.json": "json"}),
        Reader("prompts", _prompts, {"files/prompts.json": "json"}),
        Reader("flags", _flags, {"moe/flags.txt": "text"}),
        Reader("schedule", _schedule, {"files/schedule.txt": "text"}),
    )
}
HEADERS: dict[str, Reader] = {
    "open": Reader("open", _opened("hf", "megatron"), _pick(trees.HF, "safetensors"))
}
# What calls a model fine, or not: each returns an exit code.
METADATA: dict[str, Reader] = {
    reader.name: reader
    for reader in (
        Reader("audit", _command("audit", "{i}/moe"), {"moe/iter_*/.metadata": "metadata"}),
        Reader(
            "audit a run", _command("audit", "{i}/saved"), {"saved/iter_*/.metadata": "metadata"}
        ),
        Reader(
            "convert",
            _converted("--from", "{i}/dense", *trees.EXPERTS, *trees.ALONE),
            {"dense/iter_*/.metadata": "metadata"},
        ),
        Reader(
            "keep layers",
            _converted("--from", "{i}/moe", "--keep-layers", "0,1", *trees.ALONE),
            {"moe/iter_*/.metadata": "metadata"},
        ),
    )
}


def sites(root: Path, kinds: dict[str, Reader]) -> list[tuple[Reader, Path, str]]:
    """Return every file of every reader, with its kind."""
    return [(reader, path, kind) for reader in kinds.values() for pattern,
    kind in reader.files.items()
            for path in sorted(root.glob(pattern))]  # fmt: skip


def mend(spoiled: Path, healthy: Path) -> None:
    """Make a folder as it was; files that nobody touched stay."""
    if spoiled.is_symlink():
        spoiled.unlink()
    spoiled.mkdir(exist_ok=True)
    wanted = {path.relative_to(healthy): path for path in healthy.rglob("*")}
    for path in sorted(spoiled.rglob("*"), reverse=True):
        like = wanted.get(path.relative_to(spoiled))
        if like is None or _state(path) != _state(like):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    for name, path in sorted(wanted.items()):
        if path.is_dir():
            (spoiled / name).mkdir(exist_ok=True)
        elif not os.path.lexists(spoiled / name):
            shutil.copy2(path, spoiled / name)


def _state(path: Path) -> tuple[int, ...]:
    state = path.lstat()
    kind = stat.S_IFMT(state.st_mode)
    return (kind,) if kind == stat.S_IFDIR else (kind, state.st_size, state.st_mtime_ns)


def learn(root: Path, watched: watch.Watch) -> None:
    """Let every reader read what is healthy; what it does then, and imports, is allowed."""
    carried.learn(root / "moe")  # which `convert` wrote
    for readers in (PICKLES, TEXTS, HEADERS, METADATA):
        for reader in readers.values():
            quiet = io.StringIO()
            with redirect_stdout(quiet), redirect_stderr(quiet), watched.on():
                reader.read(root)
    watched.allowed = frozenset(watched.seen)
