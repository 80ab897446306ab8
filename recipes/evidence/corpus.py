"""Make the text of the evidence: what every Python installation holds, held-out files apart.

Files are those of Python's standard library and of the installed packages: sources, documentation,
licences. Each content counts once. In the order of their hashes, which is random and the same
everywhere, the first are held out, the next are trained on. One machine's packages are not
another's: the manifest has a hash of all of it, and each result repeats it.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from prepare_data import train_tokenizer, write_tokens

from ep_plugin.errors import ConfigError

EXAMPLES = """examples:
  python recipes/evidence/corpus.py                       90 MB of text into data/evidence
  python recipes/evidence/corpus.py --megabytes 5 --output data/evidence-small
  tar -cJf evidence.tar.xz data/evidence                  to carry it to a machine without packages
"""
FOLDER = Path("data/evidence")
SUFFIXES = (".py", ".pyi", ".md", ".rst", ".txt")
BYTES = range(400, 200_001)  # of a file: neither empty nor a table
HELD_OUT = {"heldout": 1_000_000, "heldout_small": 60_000}  # bytes of text


def main(argv: list[str] | None = None) -> int:
    """Make the corpus; a ConfigError is one line and exit code 2, with nothing written."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=FOLDER, help=f"folder to make ({FOLDER})")
    parser.add_argument("--megabytes", type=float, default=90, help="of text to train on (90)")
    parser.add_argument("--vocab-size", type=int, default=4096, help="tokens (4096)")
    args = parser.parse_args(argv)
    try:
        make(args.output, args.megabytes, args.vocab_size)
    except ConfigError as error:
        print(f"corpus.py: error: {error}", file=sys.stderr)
        return 2
    return 0


def make(output: Path, megabytes: float, vocab_size: int) -> None:
    """Write tokenizer.model, a .bin and .idx of each part, and manifest.json, renamed last.

    Raises ConfigError where the folder holds something already or the text is too little.
    """
    if (output / "manifest.json").is_file():
        print(f"{output} is there: nothing to do")
        return
    if output.exists():
        raise ConfigError(
            f"--output must not exist yet; {str(output)!r} does, without a corpus; use "
            f"--output {output}-2"
        )
    parts = split(texts(), {**HELD_OUT, "train": int(megabytes * 1e6)})
    output.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        train_tokenizer(parts["train"], staging, vocab_size)
        counts = {name: write_tokens(part, staging, name) for name, part in parts.items()}
        manifest = {"sha256": digest(staging), "vocab_size": vocab_size, **counts}
        (staging / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
        staging.chmod(0o755)  # mkdtemp keeps folders to their owner
        staging.rename(output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    for name, count in counts.items():
        print(f"{output}/{name}: {count['documents']:,} files, {count['tokens']:,} tokens")


def texts() -> Iterator[str]:
    """Yield the text of each file once, in the order of the contents' hashes."""
    seen: dict[str, Path] = {}
    roots = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")]
    for root in roots:
        for path in _files(root):
            wanted = path.suffix in SUFFIXES or path.name.startswith("LICENSE")
            if wanted and path.stat().st_size in BYTES:
                seen.setdefault(hashlib.sha256(path.read_bytes()).hexdigest(), path)
    for _, path in sorted(seen.items()):
        text = path.read_text(encoding="utf-8", errors="ignore")
        if text.strip():
            yield text


def _files(root: Path) -> Iterator[Path]:
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name not in ("site-packages", "__pycache__")]
        yield from (Path(folder, name) for name in names)


def split(found: Iterator[str], sizes: dict[str, int]) -> dict[str, list[str]]:
    """Return name -> texts, whole ones, until each part has its `sizes` bytes, one after another.

    Raises ConfigError where the machine has less text than that.
    """
    parts: dict[str, list[str]] = {}
    total = 0
    for name, size in sizes.items():
        parts[name], total = [], 0
        while total < size:
            text = next(found, None)
            if text is None:
                raise ConfigError(
                    f"--megabytes {size / 1e6:g} is more text than the Python packages here have; "
                    f"use --megabytes {total / 1e6:.0f}"
                )
            parts[name].append(text)
            total += len(text.encode())
    return parts


def digest(folder: Path) -> str:
    """Return one SHA-256 of all parts, each by its name and the bytes of its tokens."""
    found = hashlib.sha256()
    for part in sorted(folder.glob("*.bin")):
        found.update(f"{part.name} {hashlib.sha256(part.read_bytes()).hexdigest()}\n".encode())
    return found.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
