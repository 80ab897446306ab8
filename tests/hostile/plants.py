"""One file of a folder replaced by a hostile one, by its kind."""

import contextlib
import encodings.aliases
import os
import pickle
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.hostile import archives, metadata, pickles, texts

CODECS = sorted({*encodings.aliases.aliases.values(), "idna", "punycode", "undefined"})
Maker = Callable[[random.Random, Path, bytes], tuple[str, bytes]]


def _events(rng: random.Random, outside: Path, benign: bytes) -> tuple[str, bytes]:
    from tests.hostile.events import events_file  # TensorBoard is imported where it is needed

    return events_file(rng, outside, benign)


def _metadata(rng: random.Random, outside: Path, benign: bytes) -> tuple[str, bytes]:
    return rng.choice((metadata.edited, metadata.edited, pickles.planted, _damaged))(
        rng, outside, benign
    )


def _damaged(rng: random.Random, outside: Path, benign: bytes) -> tuple[str, bytes]:
    kind, data = pickles.damaged(rng, benign)
    return f"damaged: {kind}", data


def _archive(rng: random.Random, outside: Path, benign: bytes) -> tuple[str, bytes]:
    return rng.choice((archives.planted, archives.planted, metadata.arguments))(
        rng, outside, benign
    )


def _python(rng: random.Random, outside: Path, benign: bytes) -> tuple[str, bytes]:
    deep = rng.choice((100, 5_000, 100_000))
    made = str(outside / pickles.MARK)
    text, codec = benign.decode(), rng.choice((*CODECS, pickles.MODULE, "x" * 5000))
    kinds = {
        "code": f"open({made!r}, 'w')\n{text}",
        "import": f"import {pickles.MODULE}\n{text}",
        "coding": f"# -*- coding: {codec} -*-\n{text}",
        "nested": f"x = {'(' * deep}{')' * deep}\n{text}",
        "operators": f"x = {'-' * deep}1\n{text}",
        "long": f"x = {'1' * 10000}\n{text}",
        "broken": text.replace("(", "", 1),
        "zero": text + "\0",
        "empty": "",
    }
    kind = rng.choice(sorted(kinds))
    return f"script: {kind}", kinds[kind].encode()


def _sentencepiece(rng: random.Random, outside: Path, benign: bytes) -> tuple[str, bytes]:
    from tests.hostile.words import sentencepiece_file

    return sentencepiece_file(rng, outside, benign)


MAKERS: dict[str, Maker] = {
    "metadata": _metadata,
    "archive": _archive,
    "json": texts.json_file,
    "lines": texts.json_lines,
    "safetensors": texts.safetensors_file,
    "text": texts.text_file,
    "events": _events,
    "python": _python,
    "sentencepiece": _sentencepiece,
}


def plant(rng: random.Random, path: Path, kind: str, outside: Path) -> str:
    """Replace the file `path`; returns what was planted."""
    if rng.random() < 0.12:
        return link(rng, path, outside)
    if kind == "chunks":
        return chunk(rng, path, outside)
    label, data = MAKERS[kind](rng, outside, path.read_bytes())
    path.write_bytes(data)
    return label


def chunk(rng: random.Random, path: Path, outside: Path) -> str:
    """Replace one tensor or object in a file of many, and let `.metadata` point to it."""
    found: Any = metadata.load(path.parent)
    places = [i for i, s in found.storage_data.items() if s.relative_path == path.name]
    common = [index for index in places if index.fqn.startswith("common_state")]
    index = rng.choice(common if common and rng.random() < 0.4 else places)
    stored, data = found.storage_data[index], path.read_bytes()
    benign = data[stored.offset : stored.offset + stored.length]
    kind, evil = _archive(rng, outside, benign)
    if len(evil) <= stored.length:
        data = data[: stored.offset] + evil + data[stored.offset + len(evil) :]
        offset = stored.offset
    else:
        offset, data = len(data), data + evil
    found.storage_data[index] = replace(stored, offset=offset, length=len(evil))
    path.write_bytes(data)
    (path.parent / ".metadata").write_bytes(pickle.dumps(found))
    return f"chunk: {kind}"


# Files that nothing asks for, and that some loader might take up where they lie.
BESIDE = (
    *("sitecustomize.py", "json.py", "torch.py", f"{pickles.MODULE}.py", "conftest.py"),
    *("common.pt", "model.pt2", "pytorch_model.bin", "model_optim_rng.pt", "distrib_optim.pt"),
    *("adapter_config.json", "processor_config.json", "chat_template.jinja", "matplotlibrc"),
    *("tokenizer.model", "added_tokens.json", "special_tokens_map.json", "config.json", ".env"),
)


def beside(rng: random.Random, folder: Path, outside: Path) -> str:
    """Put one more file into a folder."""
    path = folder / rng.choice(BESIDE)
    if path.exists():
        return "nothing"
    kinds: dict[str, Maker] = {".py": _python, ".json": texts.json_file, ".pt": pickles.planted}
    make = kinds.get(path.suffix, texts.text_file)
    benign = {".py": b"x = 1\n", ".json": b"{}"}.get(path.suffix, b"\x80\x04}.")
    label, data = make(rng, outside, benign)
    path.write_bytes(data)
    return f"beside: {label}"


LEFT_ALONE = "left alone\n"  # in the one plain file outside
LINKS = ("file", "folder", "loop", "zero", "pipe", "device", "directory", "gone", "huge", "parent")


def link(rng: random.Random, path: Path, outside: Path) -> str:
    """Put something else than a plain file there: a link, a pipe, a folder, nothing, 1 TiB."""
    kind = rng.choice(LINKS)
    if kind == "parent":
        folder = path.parent
        shutil.move(folder, outside / "moved")
        folder.symlink_to(outside / "moved")
        return "link: parent"
    path.unlink()
    targets = {
        "file": outside / "file", "folder": outside, "loop": path, "zero": Path("/dev/zero"),
        "device": Path("/dev/full"),
    }  # fmt: skip
    if kind in targets:
        path.symlink_to(targets[kind])
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "huge":
        with path.open("wb") as stream, contextlib.suppress(OSError):
            stream.truncate(1 << 40)
    return f"link: {kind}"


def outside_folder(folder: Path) -> Path:
    """Make what hostile names lead to: files that nobody may change, a pipe, a loop, a module."""
    folder.mkdir(parents=True)
    (folder / "file").write_text(LEFT_ALONE)
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to(folder / "loop")
    made = str(folder / pickles.MARK)
    (folder / f"{pickles.MODULE}.py").write_text(f"open({made!r}, 'w').close()\n")
    return folder
