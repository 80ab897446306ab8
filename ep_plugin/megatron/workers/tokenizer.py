"""A tokenizer of any kind; a vocabulary of tiktoken is read by Megatron's own class for it."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from ep_plugin.checkpoint import text
from ep_plugin.checkpoint.text import GIVE, Place, Tokenizer
from ep_plugin.errors import BackendUnavailable, ConfigError
from ep_plugin.untrusted import cut, read_json

_MEGATRON = "megatron.core.tokenizers.text.libraries.tiktoken_tokenizer"
_MAX_BYTES = 128 << 20  # of a vocabulary: a hundred bytes for each of a million tokens


@dataclass(frozen=True)
class _TikToken:
    model: Any
    end: int | None
    size: int | None

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.model.encode(text, allowed_special="all")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self.model.decode(list(ids))
        return text


def load(place: Place) -> Tokenizer:
    """Return the tokenizer; raises ConfigError for none."""
    return _tiktoken(place) if place.kind == "tiktoken" else text.load(place)


def _tiktoken(place: Place) -> Tokenizer:
    # Read in bounds first: Megatron would follow whatever is there.
    read_json(Path(place.path), GIVE, kind=list, max_bytes=_MAX_BYTES)
    try:
        import_module("tiktoken")
    except ImportError as error:
        raise BackendUnavailable(
            f"the tokenizer {place.path} needs tiktoken ({error}); run pip install tiktoken"
        ) from error
    try:
        made = import_module(_MEGATRON).TikTokenTokenizer(place.path, **place.options)
    except Exception as error:  # of any kind, for a file or sizes that contradict each other
        words = cut(f"{type(error).__name__}: {error}")
        raise ConfigError(
            f"{place.path} is no vocabulary of tiktoken with {place.options or 'defaults'} "
            f"({words}); {GIVE}"
        ) from error
    return _TikToken(made.tokenizer, made.eod, made.vocab_size)
