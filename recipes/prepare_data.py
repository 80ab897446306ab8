"""Make training data for Megatron from text: a SentencePiece tokenizer and a .bin/.idx pair."""

import argparse
import hashlib
import json
import os
import shutil
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import sentencepiece
import torch
from tqdm import tqdm

from ep_plugin.config import ConfigError

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
MAX_LINE = 4192  # bytes; SentencePiece skips longer lines in training


def main(argv: list[str] | None = None) -> int:
    """Prepare the data; a ConfigError is one line and exit code 2, with nothing written."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "input",
        nargs="*",
        type=Path,
        help="folders, text files or JSONL; default: Python's library",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("data/quickstart"), help="folder to make"
    )
    parser.add_argument("--vocab-size", type=int, default=4096, help="tokens (default 4096)")
    parser.add_argument("--json-key", default="text", help="the text's key in JSONL (default text)")
    args = parser.parse_args(argv)
    try:
        prepare(args.input or [standard_library()], args.output, args.vocab_size, args.json_key)
    except ConfigError as error:
        print(f"prepare_data.py: error: {error}", file=sys.stderr)
        return 2
    return 0


def standard_library() -> Path:
    """Return the folder of the running Python's standard library, real text on every machine."""
    return Path(sysconfig.get_path("stdlib"))


def prepare(inputs: list[Path], output: Path, vocab_size: int, json_key: str) -> None:
    """Write tokenizer.model, corpus.bin, corpus.idx and manifest.json into `output`.

    The folder is written beside and renamed last. Raises ConfigError for input without text, and
    for an output folder that holds something else.
    """
    files = list_files(inputs)
    wanted = {"files": fingerprint(files), "vocab_size": vocab_size, "json_key": json_key}
    if is_complete(output, wanted):
        print(f"{output} is complete: nothing to do")
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        documents = read_all(files, json_key)
        train_tokenizer(documents, staging, vocab_size)
        counts = write_tokens(documents, staging)
        manifest = {**wanted, **counts}
        (staging / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
        if output.exists():
            output.rmdir()  # is_complete made sure that it is empty
        staging.chmod(0o755)  # mkdtemp keeps folders to their owner
        staging.rename(output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    print(
        f"{output}: {counts['documents']:,} documents, {counts['tokens']:,} tokens, "
        f"vocabulary {vocab_size}"
    )


def list_files(inputs: list[Path]) -> list[Path]:
    """Return every text file under `inputs`, sorted; raises ConfigError for a missing input."""
    files: list[Path] = []
    for path in inputs:
        if path.is_dir():
            found = (p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
            files += sorted(p for p in found if "site-packages" not in p.parts)
        elif path.is_file():
            files.append(path)
        else:
            raise ConfigError(f"INPUT must be a file or a folder; {str(path)!r} does not exist")
    return files


def fingerprint(files: list[Path]) -> str:
    """Return a hash of the files' names and sizes."""
    listed = "\n".join(f"{path} {path.stat().st_size}" for path in files)
    return hashlib.sha256(listed.encode()).hexdigest()


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
        f"--output must be empty or hold the same data; {str(output)!r} holds something else; "
        f"--output {output}-2 would do"
    )


def read_all(files: list[Path], json_key: str) -> list[str]:
    """Return the documents; raises ConfigError when there is no text in any file."""
    documents = []
    for path in tqdm(files, desc="reading", unit="file", disable=None):
        documents += [text for text in read_file(path, json_key) if text.strip()]
    if not documents:
        raise ConfigError(
            f"INPUT must hold text; {len(files)} file(s) ({', '.join(SUFFIXES)}) were read "
            "and none had any; without INPUT Python's standard library is taken"
        )
    return documents


def read_file(path: Path, json_key: str) -> Iterator[str]:
    """Yield the documents of one file: each line of JSONL, else the whole text.

    Raises ConfigError, with the line, for JSONL that has no such key.
    """
    if path.suffix != ".jsonl":
        yield path.read_text(encoding="utf-8", errors="ignore")
        return
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                yield json.loads(line)[json_key]
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(
                    f"each line of {path} must be JSON with the key {json_key!r}; "
                    f"line {number} is not ({error}); --json-key names another key"
                ) from error


def train_tokenizer(documents: list[str], folder: Path, vocab_size: int) -> None:
    """Train a byte-pair tokenizer, tokenizer.model; raises ConfigError for too little text."""
    lines = [line for text in documents for line in text.splitlines() if line.strip()]
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
            max_sentence_length=MAX_LINE,
            num_threads=os.cpu_count() or 1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ConfigError(
            f"--vocab-size ({vocab_size}) does not fit the text: {error}; a smaller one would do"
        ) from error
    (folder / "tokenizer.vocab").unlink()


def write_tokens(documents: list[str], folder: Path) -> dict[str, int]:
    """Write corpus.bin and corpus.idx, each document closed by the end-of-sentence token."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron names each GPU package that is not there
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    tokenizer = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
    dtype = DType.optimal_dtype(tokenizer.vocab_size())
    builder = IndexedDatasetBuilder(str(folder / "corpus.bin"), dtype=dtype)
    tokens = 0
    for text in tqdm(documents, desc="tokenising", unit="doc", disable=None):
        ids = [*tokenizer.encode(text), tokenizer.eos_id()]
        builder.add_document(torch.tensor(ids), [len(ids)])
        tokens += len(ids)
    builder.finalize(str(folder / "corpus.idx"))
    return {"documents": len(documents), "tokens": tokens}


if __name__ == "__main__":
    sys.exit(main())
