"""Make the text of the evidence, held-out files apart.

Without --from it is what every Python installation holds: the standard library and the installed
packages, their sources, documentation and licences. With --from it is text of your own: the files
of text below each folder, in equal shares; a folder that has less gives all of it.

Each content counts once. In the order of their hashes, which is random and the same everywhere, the
first are held out, the next are trained on. The manifest has a hash of all of it, and what came
from where; each result repeats the hash.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from prepare_data import train_tokenizer, write_tokens

from ep_plugin.errors import ConfigError

EXAMPLES = """examples:
  python recipes/evidence/corpus.py                       90 MB of text into data/evidence
  python recipes/evidence/corpus.py --megabytes 5 --output data/evidence-small
  python recipes/evidence/corpus.py --from ../books ../git --megabytes 290 --output data/large
"""
FOLDER = Path("data/evidence")
PACKAGES = frozenset({".py", ".pyi", ".md", ".rst", ".txt"})
MORE = ("adoc", "tex", "xml", "c", "h", "cc", "cpp", "hpp", "rs", "go", "java", "kt", "js", "ts")
STILL = ("rb", "ml", "mli", "scala", "ex", "exs", "sh", "pl")
TEXT = PACKAGES | {f".{suffix}" for suffix in MORE + STILL}
SMALLEST = 400  # bytes of a file
LARGEST = {"packages": 200_000, "from": 4_000_000}  # a table is larger, or a book
HELD_OUT = {"heldout": 1_000_000, "heldout_small": 60_000}  # bytes of text
Parts = dict[str, list[str]]


def main(argv: list[str] | None = None) -> int:
    """Make the corpus; a ConfigError is one line and exit code 2, with nothing written."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=FOLDER, help=f"folder to make ({FOLDER})")
    parser.add_argument("--megabytes", type=float, default=90, help="of text to train on (90)")
    parser.add_argument("--vocab-size", type=int, default=4096, help="tokens (4096)")
    parser.add_argument(
        "--from", nargs="+", type=Path, dest="folders", metavar="FOLDER", help="text of your own"
    )
    args = parser.parse_args(argv)
    try:
        make(args.output, args.megabytes, args.vocab_size, args.folders or [])
    except ConfigError as error:
        print(f"corpus.py: error: {error}", file=sys.stderr)
        return 2
    return 0


def make(output: Path, megabytes: float, vocab_size: int, folders: list[Path]) -> None:
    """Write tokenizer.model, a .bin and .idx of each part, and manifest.json, renamed last.

    Raises ConfigError where the output holds something already, a folder of `folders` is none or
    stands there twice, or the text is too little.
    """
    if (output / "manifest.json").is_file():
        print(f"{output} is there: nothing to do")
        return
    if output.exists():
        raise ConfigError(
            f"--output must not exist yet; {str(output)!r} does, without a corpus; use "
            f"--output {output}-2"
        )
    sizes = {**HELD_OUT, "train": int(megabytes * 1e6)}
    parts, sources = shared(folders, sizes) if folders else (packages(sizes), {})
    output.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        train_tokenizer(parts["train"], staging, vocab_size)
        counts = {name: write_tokens(part, staging, name) for name, part in parts.items()}
        manifest = {"sha256": digest(staging), "vocab_size": vocab_size, **counts}
        manifest["sources"] = sources
        (staging / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
        staging.chmod(0o755)  # mkdtemp keeps folders to their owner
        staging.rename(output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    for name, count in counts.items():
        print(f"{output}/{name}: {count['documents']:,} files, {count['tokens']:,} tokens")


def packages(sizes: dict[str, int]) -> Parts:
    """Return the parts, of what the Python packages here hold, whole files.

    Raises ConfigError where they hold less.
    """
    seen: dict[str, Path] = {}
    for name in ("stdlib", "purelib"):
        found(Path(sysconfig.get_path(name)), PACKAGES, LARGEST["packages"], seen)
    texts = read(seen)
    parts, total = {}, 0
    for name, size in sizes.items():
        parts[name] = take(texts, size)
        total = sum(len(text.encode()) for text in parts[name])
    if total < sizes["train"]:
        raise ConfigError(
            f"--megabytes {sizes['train'] / 1e6:g} is more text than the Python packages here "
            f"have; use --megabytes {total / 1e6:.0f}"
        )
    return parts


def shared(folders: list[Path], sizes: dict[str, int]) -> tuple[Parts, dict[str, Any]]:
    """Return the parts in equal shares of the folders, and what the manifest says of each folder.

    A held-out file is cut where its folder's share ends; nothing of it is trained on. Raises
    ConfigError for folders that are none or of one name, and where all of them hold less.
    """
    seen: dict[str, Path] = {}
    below: dict[str, dict[str, Path]] = {}
    for folder in folders:
        name = folder.resolve().name
        if not folder.is_dir() or name in below:
            what = "stands there twice" if folder.is_dir() else "is none"
            raise ConfigError(f"--from must be folders of text, each once; {str(folder)!r} {what}")
        below[name] = found(folder, TEXT, LARGEST["from"], seen)
    texts = {name: read(files) for name, files in below.items()}
    parts: Parts = {}
    for part in HELD_OUT:
        share = sizes[part] // len(folders)
        parts[part] = [text for of in texts.values() for text in cut(take(of, share), share)]
    rest = {name: list(of) for name, of in texts.items()}
    has = {name: sum(len(text.encode()) for text in of) for name, of in rest.items()}
    if sum(has.values()) < sizes["train"]:
        raise ConfigError(
            f"--megabytes {sizes['train'] / 1e6:g} is more text than the folders of --from have; "
            f"use --megabytes {sum(has.values()) / 1e6:.0f}"
        )
    trained = {
        name: take(iter(rest[name]), share) for name, share in shares(has, sizes["train"]).items()
    }
    parts["train"] = [text for of in trained.values() for text in of]
    return parts, {
        folder.resolve().name: said(folder, trained[folder.resolve().name]) for folder in folders
    }


def found(
    root: Path, suffixes: frozenset[str], largest: int, seen: dict[str, Path]
) -> dict[str, Path]:
    """Add a root's files to `seen`, contents' SHA-256 -> path, and return those that are new."""
    new = {}
    for path in _files(root):
        wanted = path.suffix in suffixes or path.name.startswith("LICENSE")
        if wanted and not path.is_symlink() and SMALLEST <= path.stat().st_size <= largest:
            key = hashlib.sha256(path.read_bytes()).hexdigest()
            if key not in seen:
                seen[key] = new[key] = path
    return new


def _files(root: Path) -> Iterator[Path]:
    for folder, below, names in os.walk(root):
        below[:] = sorted(
            x for x in below if x not in ("site-packages", "__pycache__") and x[0] != "."
        )
        yield from (Path(folder, name) for name in sorted(names))


def read(files: dict[str, Path]) -> Iterator[str]:
    """Yield the text of each file that has some, in the order of the contents' hashes."""
    for _, path in sorted(files.items()):
        text = path.read_text(encoding="utf-8", errors="ignore")
        if text.strip():
            yield text


def take(texts: Iterator[str], size: int) -> list[str]:
    """Return whole texts until they have `size` bytes, or there are no more."""
    taken, total = [], 0
    while total < size and (text := next(texts, None)) is not None:
        taken.append(text)
        total += len(text.encode())
    return taken


def cut(texts: list[str], size: int) -> list[str]:
    """Return the texts with the last cut where all have `size` bytes."""
    before = sum(len(text.encode()) for text in texts[:-1])
    last = texts[-1].encode()[: max(0, size - before)].decode(errors="ignore") if texts else ""
    return [*texts[:-1], *([last] if last else [])]


def shares(has: dict[str, int], size: int) -> dict[str, int]:
    """Return how many bytes of each give `size` in all: equal shares, but no more than it has."""
    given: dict[str, int] = {}
    for place, name in enumerate(sorted(has, key=lambda name: has[name])):
        left = size - sum(given.values())
        given[name] = min(has[name], -(-left // (len(has) - place)))
    return {name: given[name] for name in has}


def said(folder: Path, texts: list[str]) -> dict[str, Any]:
    """Return a folder's commit, if it is a clone, and size and hash of what is trained on."""
    hashed = hashlib.sha256()
    for text in texts:
        hashed.update(text.encode())
    asked = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    commit = None
    if (folder / ".git").exists():
        done = subprocess.run(asked, capture_output=True, text=True, check=False)
        commit = done.stdout.strip() or None
    size = sum(len(text.encode()) for text in texts)
    return {"commit": commit, "files": len(texts), "bytes": size, "sha256": hashed.hexdigest()}


def digest(folder: Path) -> str:
    """Return one SHA-256 of all parts, each by its name and the bytes of its tokens."""
    found = hashlib.sha256()
    for part in sorted(folder.glob("*.bin")):
        found.update(f"{part.name} {hashlib.sha256(part.read_bytes()).hexdigest()}\n".encode())
    return found.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
