"""A checkpoint's tokenizer: text to token ids and back. No code of a tokenizer's own is run.

a SentencePiece model     a file
a Hugging Face tokenizer  a folder, or a name, which alone may be looked up in the network
GPT-2's byte pairs        vocab.json and merges.txt (`byte_pairs.py`)
a vocabulary of tiktoken  a file .json, which Megatron itself reads (megatron/workers/tokenizer.py)
numbers                   token ids, separated by spaces; also Megatron's NullTokenizer
"""

import argparse
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit
from urllib.request import getproxies

from ep_plugin.checkpoint import byte_pairs
from ep_plugin.checkpoint.hf_tokenizer import MOST_BYTES, as_transformers_loads
from ep_plugin.errors import BackendUnavailable, ConfigError
from ep_plugin.extras import pip_install
from ep_plugin.untrusted import cut, read_bytes, shown

GIVE = "give --tokenizer, a SentencePiece model or a Hugging Face folder, or numbers for token ids"
NUMBERS: Literal["numbers"] = "numbers"
# As releases call the run argument.
SPECIAL = ("special_tokens", "tokenizer_special_tokens", "tiktoken_special_tokens")
MOST_TOKENS = 1 << 20  # of a vocabulary
Kind = Literal["numbers", "gpt2", "tiktoken", "file or name"]


@dataclass(frozen=True)
class Place:
    """Where a tokenizer is, and what else it is made of. Of plain values, as JSON has them."""

    kind: Kind
    path: str = ""
    merges: str = ""  # of gpt2
    options: dict[str, Any] = field(default_factory=dict)  # of tiktoken: how many tokens, say


class Tokenizer(Protocol):
    """Text to ids and back; `end` is the id that ends a document, None where there is none."""

    @property
    def end(self) -> int | None: ...

    @property
    def size(self) -> int | None:
        """Ids below it have a text; None: any."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


def choose(typed: str | None, args: argparse.Namespace, folder: Path) -> Place:
    """Return where a model's tokenizer is.

    `folder` is what the user gave. What a checkpoint says counts only where it is on this machine.
    Raises ConfigError for none.
    """
    kind = getattr(args, "tokenizer_type", None)
    if typed is not None:
        return _typed(typed, args)
    if (folder / "tokenizer_config.json").is_file() or (folder / "tokenizer.json").is_file():
        return Place("file or name", str(folder))
    if kind == "NullTokenizer":
        return Place(NUMBERS)
    if kind == "GPT2BPETokenizer":
        vocab, merges = (_here(args, name) for name in ("vocab_file", "merge_file"))
        if vocab and merges:
            return Place("gpt2", vocab, merges)
    elif said := _here(args, "tokenizer_model"):
        return _tiktoken(said, args) if kind == "TikTokenizer" else Place("file or name", said)
    names = ("vocab_file", "merge_file") if kind == "GPT2BPETokenizer" else ("tokenizer_model",)
    files = [value for name in names if (value := getattr(args, name, None)) is not None]
    what = f"names the tokenizer {' with '.join(map(shown, files))}, not here"
    raise ConfigError(f"{folder} {what if files else 'names no tokenizer'}; {GIVE}")


def _typed(typed: str, args: argparse.Namespace) -> Place:
    path = Path(typed)
    if typed == NUMBERS:
        return Place(NUMBERS)
    if not typed or "\0" in typed:
        raise ConfigError(f"--tokenizer must name a tokenizer; got {shown(typed)}; {GIVE}")
    if path.is_file() and path.suffix == ".json":
        return _tiktoken(typed, args)
    own = ("tokenizer.json", "tokenizer_config.json", "config.json")
    vocab, merges = path / "vocab.json", path / "merges.txt"
    if vocab.is_file() and merges.is_file() and not any((path / name).is_file() for name in own):
        return Place("gpt2", str(vocab), str(merges))
    is_name = typed.count("/") <= 1 and typed[0] not in "./~" and path.suffix != ".model"
    if not path.exists() and not is_name:
        raise ConfigError(f"--tokenizer {shown(typed)} is not there; {GIVE}")
    return Place("file or name", typed)


def _here(args: argparse.Namespace, name: str) -> str | None:
    """Return the path that a run argument names, None where nothing is there."""
    said = getattr(args, name, None)
    if not isinstance(said, str) or not said or "\0" in said:
        return None
    return said if os.path.isfile(said) or os.path.isdir(said) else None


def _tiktoken(path: str, args: argparse.Namespace) -> Place:
    """Return the place of a vocabulary of tiktoken; the run arguments say what stands before it."""
    options = {
        "pattern": getattr(args, "tiktoken_pattern", None),
        "vocab_size": getattr(args, "vocab_size", None),
        "num_special_tokens": getattr(args, "tiktoken_num_special_tokens", None),
        "special_tokens": next(
            (found for name in SPECIAL if (found := getattr(args, name, None)) is not None), None
        ),
    }
    given = {name: value for name, value in options.items() if value is not None}
    fits = (
        given.get("pattern", "v2") in ("v1", "v2")
        and all(
            type(given.get(name, 1)) is int and 0 < given.get(name, 1) <= MOST_TOKENS
            for name in ("vocab_size", "num_special_tokens")
        )
        and type(given.get("special_tokens", [])) is list
        and all(type(each) is str for each in given.get("special_tokens", []))
    )
    if not fits:
        raise ConfigError(
            f"the run arguments describe no tokenizer of tiktoken ({shown(given)}); {GIVE}"
        )
    return Place("tiktoken", path, options=given)


def load(place: Place) -> Tokenizer:
    """Return a tokenizer of any kind but tiktoken; raises ConfigError for none."""
    if place.kind == "gpt2":
        return byte_pairs.load(Path(place.path), Path(place.merges), GIVE)
    if place.kind == NUMBERS:
        return Numbers()
    path = Path(place.path)
    if path.is_file():
        return _sentence_piece(path)
    asked = f"--tokenizer {place.path}"
    return hugging_face(place.path, path.is_dir(), asked, shown(place.path), GIVE)


@dataclass(frozen=True)
class Numbers:
    """Token ids as text."""

    end: int | None = None
    size: int | None = None

    def encode(self, text: str) -> list[int]:
        words = text.split()
        if not all(word.isascii() and word.isdigit() and len(word) < 10 for word in words):
            raise ConfigError(
                f"without a tokenizer a prompt is token ids such as '1 2 3'; got {shown(text)}; "
                "use numbers, or give --tokenizer, a SentencePiece model or a Hugging Face folder"
            )
        return [int(word) for word in words]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))


@dataclass(frozen=True)
class _SentencePiece:
    model: Any
    end: int | None
    size: int | None

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.model.encode(text)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self.model.decode(list(ids))
        return text


@dataclass(frozen=True)
class _HuggingFace:
    model: Any
    called: str
    instead: str

    @property
    def end(self) -> int | None:
        found = self.model.eos_token_id
        return found if isinstance(found, int) else None

    @property
    def size(self) -> int | None:
        return len(self.model)

    def encode(self, text: str) -> list[int]:
        try:
            ids: list[int] = self.model(text)["input_ids"]
        except BaseException as error:  # of any kind, where a setting of it is
            _only_of_files(error)
            raise ConfigError(
                f"the tokenizer of {self.called} makes no tokens of {shown(text)} "
                f"({cut(str(error))}); {self.instead}"
            ) from error
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self.model.decode(list(ids), skip_special_tokens=True)
        return text


def _sentence_piece(path: Path) -> Tokenizer:
    try:
        package: Any = import_module("sentencepiece")
    except ImportError as error:
        raise BackendUnavailable(
            f"--tokenizer {path} needs sentencepiece ({error}); run pip install sentencepiece"
        ) from error
    content = read_bytes(path, GIVE, MOST_BYTES)
    try:
        model = package.SentencePieceProcessor(model_proto=content)
        end = model.eos_id()
        return _SentencePiece(model, end if end >= 0 else None, model.get_piece_size())
    except Exception as error:  # of any kind, for a damaged file
        raise ConfigError(
            f"{path} is no SentencePiece model ({cut(str(error))}); {GIVE}"
        ) from error


def hugging_face(
    where: str | Path, local: bool, asked: str, called: str, instead: str
) -> Tokenizer:
    """Return the tokenizer of transformers at `where`, on this machine alone where it is `local`.

    Raises BackendUnavailable, which says what was `asked`, without transformers; and ConfigError
    for what it cannot load, which is `called` so, and says what to use `instead`.
    """
    reachable = True
    try:
        tokenizer: Any = import_module("transformers").AutoTokenizer
        if local:
            with as_transformers_loads(Path(where), called, instead) as view:
                model = tokenizer.from_pretrained(
                    view, local_files_only=True, trust_remote_code=False
                )
        else:  # False, not its default: that asks on stdin whether to run the folder's own code
            reachable = hub_is_reachable()
            model = tokenizer.from_pretrained(
                where, local_files_only=not reachable, trust_remote_code=False
            )
        return _HuggingFace(model, called, instead)
    except ConfigError:
        raise
    except ImportError as error:
        raise BackendUnavailable(
            f"{asked} needs transformers ({error}); use {pip_install('hf')}"
        ) from error
    except BaseException as error:  # of any kind, for a damaged file
        _only_of_files(error)
        own = "trust_remote_code" in str(error)
        if isinstance(error, OSError) and not (reachable or own):
            raise ConfigError(
                f"{called} is no folder or file here, transformers has no copy of a tokenizer of "
                f"that name, and the network cannot be reached; {instead}"
            ) from error
        why = "it needs Python code of its own, which is not run" if own else cut(str(error))
        raise ConfigError(
            f"{called} has no tokenizer that transformers can load ({why}); {instead}"
        ) from error


def hub_is_reachable() -> bool:
    """Whether the name of Hugging Face's hub, or of HF_ENDPOINT's, is known; True behind a proxy.

    Without a network its client would try again for half a minute.
    """
    if getproxies().keys() - {"no"}:
        return True
    try:
        host = urlsplit(os.environ.get("HF_ENDPOINT", "")).hostname or "huggingface.co"
        socket.getaddrinfo(host, 443)
    except (OSError, ValueError):  # the latter: no name of a host
        return False
    return True


def _only_of_files(error: BaseException) -> None:
    """Raise it again unless it is an Exception or what a package in Rust raises, which is none."""
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error
