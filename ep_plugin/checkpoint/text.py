"""A checkpoint's tokenizer: text to token ids and back. No code of a tokenizer's own is run.

a SentencePiece model     a file
a Hugging Face tokenizer  a folder, or a name, which alone may be looked up in the network
numbers                   token ids, separated by spaces; also Megatron's NullTokenizer
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from ep_plugin.errors import BackendUnavailable, ConfigError
from ep_plugin.untrusted import cut, shown

GIVE = "give --tokenizer, a SentencePiece model or a Hugging Face folder, or numbers for token ids"
NUMBERS = "numbers"


class Tokenizer(Protocol):
    """Text to ids and back; `end` is the id that ends a document, None where there is none."""

    @property
    def end(self) -> int | None: ...

    @property
    def size(self) -> int | None:
        """Ids below it have a text; None: any."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


def choose(typed: str | None, args: argparse.Namespace, folder: Path) -> str:
    """Return where a model's tokenizer is: a path, a name that was typed, or NUMBERS.

    `folder` is what the user gave. What a checkpoint says counts only where it is on this machine.
    Raises ConfigError for none.
    """
    if typed is not None:
        return typed
    if (folder / "tokenizer_config.json").is_file() or (folder / "tokenizer.json").is_file():
        return str(folder)
    kind = getattr(args, "tokenizer_type", None)
    if kind == "NullTokenizer":
        return NUMBERS
    said = getattr(args, "tokenizer_model", None)
    if isinstance(said, str) and said and "\0" not in said and Path(said).exists():
        return said
    what = "names no tokenizer" if said is None else f"names the tokenizer {shown(said)}, not here"
    raise ConfigError(f"{folder} {what}; {GIVE}")


def load(where: str) -> Tokenizer:
    """Return the tokenizer at `where`, as `choose` returns it; raises ConfigError for none."""
    if where == NUMBERS:
        return Numbers()
    path = Path(where)
    if path.is_file():
        return _sentence_piece(path)
    return _hugging_face(where, local=path.is_dir())


@dataclass(frozen=True)
class Numbers:
    """Token ids as text."""

    end: int | None = None
    size: int | None = None

    def encode(self, text: str) -> list[int]:
        words = text.split()
        if not all(word.isascii() and word.isdigit() and len(word) < 10 for word in words):
            raise ConfigError(
                "this model was trained without a tokenizer, and a prompt is token ids such as "
                f"'1 2 3'; got {shown(text)}; {GIVE}"
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
    end: int | None
    size: int | None

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.model(text)["input_ids"]
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
    try:
        model = package.SentencePieceProcessor(model_file=str(path))
        end = model.eos_id()
        return _SentencePiece(model, end if end >= 0 else None, model.get_piece_size())
    except Exception as error:  # of any kind, for a damaged file
        raise ConfigError(
            f"{path} is no SentencePiece model ({cut(str(error))}); {GIVE}"
        ) from error


def _hugging_face(where: str, local: bool) -> Tokenizer:
    model = auto_tokenizer(where, local, f"--tokenizer {where}", shown(where), GIVE)
    end = model.eos_token_id
    return _HuggingFace(model, end if isinstance(end, int) else None, len(model))


def auto_tokenizer(where: str | Path, local: bool, asked: str, called: str, instead: str) -> Any:
    """Return the tokenizer of transformers at `where`, on this machine alone where it is `local`.

    Raises BackendUnavailable, which says what was `asked`, without transformers; and ConfigError
    for what it cannot load, which is `called` so, and says what to use `instead`.
    """
    try:
        tokenizer: Any = import_module("transformers").AutoTokenizer
        # False, not its default: that asks on stdin whether to run the folder's own code.
        return tokenizer.from_pretrained(where, local_files_only=local, trust_remote_code=False)
    except ImportError as error:
        raise BackendUnavailable(
            f"{asked} needs transformers ({error}); install 'ep-plugin[hf]'"
        ) from error
    except Exception as error:  # of any kind, for a damaged file
        own = "trust_remote_code" in str(error)
        why = "it needs Python code of its own, which is not run" if own else cut(str(error))
        raise ConfigError(
            f"{called} has no tokenizer that transformers can load ({why}); {instead}"
        ) from error
