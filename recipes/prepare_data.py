"""Make training data for Megatron from text: a SentencePiece tokenizer and a .bin/.idx pair."""

import argparse
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import sentencepiece
import torch
from tqdm import tqdm

from ep_plugin.errors import ConfigError

EXAMPLES = """examples:
  python recipes/prepare_data.py --output data/quickstart          Python's standard library, ~30 MB
  python recipes/prepare_data.py docs/ notes.txt --output data/mine
  python recipes/prepare_data.py corpus.jsonl --json-key text --vocab-size 8192 --output data/mine

then, in Megatron:
  --tokenizer-type SentencePieceTokenizer --tokenizer-model data/mine/tokenizer.model
  --data-path data/mine/corpus
"""
SUFFIXES = (".txt", ".md", ".rst", ".py", ".jsonl", ".json")  # taken from folders
TRAINING_SENTENCES = 60_000  # lines the tokenizer is trained on
MAX_LINE = 4192  # characters; the tokenizer is trained on longer lines in pieces
MIN_DOCUMENTS = 1000  # Megatron splits by document and waits forever on a split that has none


def main(argv: list[str] | None = None) -> int:
    """Prepare the data; a ConfigError is one line and exit code 2, with nothing written."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = "folders, text files or JSONL; default: Python's library"
    parser.add_argument("input", nargs="*", type=Path, help=what)
    folder = Path("data/quickstart")
    parser.add_argument("--output", type=Path, default=folder, help="folder to make")
    parser.add_argument("--vocab-size", type=int, default=4096, help="tokens (default 4096)")
    parser.add_argument("--json-key", default="text", help="the text's key in JSONL (default text)")
    args = parser.parse_args(argv)
    inputs = args.input or [Path(sysconfig.get_path("stdlib"))]  # real text on every machine
    try:
        prepare(inputs, args.output, args.vocab_size, args.json_key)
    except ConfigError as error:
        print(f"prepare_data.py: error: {error}", file=sys.stderr)
        return 2
    return 0


def prepare(inputs: list[Path], output: Path, vocab_size: int, json_key: str) -> None:
    """Write tokenizer.model, corpus.bin, corpus.idx and manifest.json into `output`.

    Everything is written beside and renamed last. Raises ConfigError for input without text, for a
    vocabulary that does not fit it and for an output folder that holds something else.
    """
    if vocab_size < 1:
        raise ConfigError(
            f"--vocab-size must be at least 1; got {vocab_size}; use --vocab-size 4096"
        )
    files = list_files(inputs)
    wanted = {"files": fingerprint(files), "vocab_size": vocab_size, "json_key": json_key}
    if is_complete(output, wanted):
        print(f"{output} is complete: nothing to do")
        return
    documents = read_all(files, json_key)
    nearest = next(folder for folder in output.absolute().parents if folder.exists())
    if not nearest.is_dir():
        raise ConfigError(
            f"--output must lie in a folder; {str(nearest)!r} is a file; use "
            f"--output {nearest}-data"
        )
    staging = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=nearest))
    try:
        train_tokenizer(documents, staging, vocab_size)
        counts = write_tokens(enough_documents(documents), staging)
        manifest = {**wanted, **counts}
        (staging / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
        if output.exists():
            output.rmdir()  # is_complete made sure that it is empty
        staging.chmod(0o755)  # mkdtemp keeps folders to their owner
        output.parent.mkdir(parents=True, exist_ok=True)
        staging.rename(output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    print(f"{output}: {counts['documents']:,} documents, {counts['tokens']:,} tokens")


def list_files(inputs: list[Path]) -> list[Path]:
    """Return every text file under `inputs`, sorted; raises ConfigError for a missing input."""
    files: list[Path] = []
    for path in inputs:
        if path.is_dir():
            found = (p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
            files += sorted(p for p in found if "site-packages" not in p.relative_to(path).parts)
        elif path.is_file():
            files.append(path)
        else:
            raise ConfigError(
                f"INPUT must be a file or a folder; {str(path)!r} does not exist here"
            )
    return files


def fingerprint(files: list[Path]) -> str:
    """Return a hash of the files' contents in their order, wherever they lie."""
    listed = [f"{p.suffix} {hashlib.sha256(p.read_bytes()).hexdigest()}" for p in files]
    return hashlib.sha256("\n".join(listed).encode()).hexdigest()


def is_complete(output: Path, wanted: dict[str, object]) -> bool:
    """Whether `output` holds this very data; raises ConfigError when it holds something else."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    manifest = output / "manifest.json"
    if manifest.is_file():
        found = json.loads(manifest.read_text())
        if all(found.get(key) == value for key, value in wanted.items()):
            return True
    raise ConfigError(
        f"--output must be empty or hold the same data; {str(output)!r} holds something else; use "
        f"--output {output}-2"
    )


def read_all(files: list[Path], json_key: str) -> list[str]:
    """Return the documents; raises ConfigError when the files hold next to no text."""
    documents = []
    for path in tqdm(files, desc="reading", unit="file", disable=None):
        documents += [text for text in read_file(path, json_key) if text.strip()]
    characters = sum(map(len, documents))
    if characters < MIN_DOCUMENTS:
        raise ConfigError(
            f"INPUT must hold text, at least {MIN_DOCUMENTS} characters; {len(files)} file(s) "
            f"({', '.join(SUFFIXES)}) held {characters}; without INPUT Python's standard library "
            "is taken"
        )
    return documents


def enough_documents(documents: list[str]) -> list[str]:
    """Return `documents`, cut into at least MIN_DOCUMENTS parts, at line ends if lines allow it."""
    if len(documents) >= MIN_DOCUMENTS:
        return documents
    size = sum(map(len, documents)) // MIN_DOCUMENTS  # characters
    parts: list[str] = []
    for text in documents:
        start = 0
        while start < len(text):
            end = text.rfind("\n", start, start + size) + 1 or start + size
            parts.append(text[start:end])
            start = end
    print(f"{len(documents):,} documents cut into {len(parts):,}, so that each split has some")
    return parts


def read_file(path: Path, json_key: str) -> Iterator[str]:
    """Yield the documents of one file: each line of JSONL but blank ones, else the whole text.

    Raises ConfigError, with the line, for JSONL that has no text under that key.
    """
    if path.suffix != ".jsonl":
        yield path.read_text(encoding="utf-8", errors="ignore")
        return
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield read_line(line, json_key, f"line {number} of {path}")


def read_line(line: bytes, json_key: str, name: str) -> str:
    """Return the text in one line of JSONL; raises ConfigError, with its `name`, without one."""
    try:
        text = json.loads(line)[json_key]
        if isinstance(text, str):
            text.encode()  # fails for half of a surrogate pair, which JSON can hold
            return text
        found = f"{type(text).__name__} under that key"
    except KeyError:
        found = "no such key"
    except (ValueError, TypeError) as error:
        found = str(error)
    raise ConfigError(
        f"each line must be a JSON object with text under the key {json_key!r}; {name} is not "
        f"({found}); --json-key names another key"
    )


def train_tokenizer(documents: list[str], folder: Path, vocab_size: int) -> None:
    """Train a byte-pair tokenizer, tokenizer.model; raises ConfigError for too little text."""
    whole = (line for text in documents for line in text.splitlines() if line.strip())
    lines = [line[i : i + MAX_LINE] for line in whole for i in range(0, len(line), MAX_LINE)]
    step = max(1, len(lines) // TRAINING_SENTENCES)
    print(f"training the tokenizer on {len(lines[::step]):,} of {len(lines):,} lines", flush=True)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines[::step]),
            model_prefix=str(folder / "tokenizer"),
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,  # any text can be encoded and decoded again
            remove_extra_whitespaces=False,
            normalization_rule_name="identity",
            allow_whitespace_only_pieces=True,
            add_dummy_prefix=False,
            user_defined_symbols=["\n"],
            max_sentence_length=4 * MAX_LINE,  # bytes
            num_threads=os.cpu_count() or 1,
            minloglevel=2,
        )
    except RuntimeError as error:
        limit = re.search(r"(?:value <=|\d vs) (\d+)", str(error))
        raise ConfigError(
            f"--vocab-size ({vocab_size}) does not fit the text; "
            + (f"use --vocab-size {limit[1]}" if limit else f"SentencePiece says: {error}")
        ) from error
    (folder / "tokenizer.vocab").unlink()


@contextmanager
def quiet() -> Iterator[None]:
    """Keep back warnings: on import Megatron and torch name each GPU package that is not there."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def write_tokens(documents: list[str], folder: Path, name: str = "corpus") -> dict[str, int]:
    """Write NAME.bin and NAME.idx, each document closed by the end-of-sentence token."""
    with quiet():
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    tokenizer = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
    dtype = DType.optimal_dtype(tokenizer.vocab_size())
    builder = IndexedDatasetBuilder(str(folder / f"{name}.bin"), dtype=dtype)
    tokens = 0
    for text in tqdm(documents, desc="tokenising", unit="doc", disable=None):
        ids = [*tokenizer.encode(text), tokenizer.eos_id()]
        builder.add_document(torch.tensor(ids), [len(ids)])
        tokens += len(ids)
    builder.finalize(str(folder / f"{name}.idx"))
    return {"documents": len(documents), "tokens": tokens}


if __name__ == "__main__":
    sys.exit(main())
