"""GPT-2's tokenizer, of the two files that Megatron's --vocab-file and --merge-file name."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from ep_plugin.errors import BackendUnavailable, ConfigError
from ep_plugin.extras import pip_install
from ep_plugin.untrusted import cut, read_json, read_text, shown

END = "<|endoftext|>"
LARGEST_ID = 1 << 24


@dataclass(frozen=True)
class BytePairs:
    """Bytes, merged into tokens."""

    model: Any
    end: int | None
    size: int | None

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.model.encode(text).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self.model.decode(list(ids), skip_special_tokens=True)
        return text


def load(vocab: Path, merges: Path, instead: str) -> BytePairs:
    """Return the tokenizer of a vocabulary (JSON, token to id) and its merges (a pair a line).

    Raises BackendUnavailable without the package tokenizers; ConfigError for files that are none,
    which says what to give `instead`.
    """
    ids = read_json(vocab, instead)
    lines = read_text(merges, instead).splitlines()
    pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    numbers = list(ids.values())
    plain = all(type(number) is int and 0 <= number < LARGEST_ID for number in numbers)
    if not plain or len(set(numbers)) < len(numbers):
        raise ConfigError(f"{vocab} is no vocabulary: each token must have an id; {instead}")
    for pair in pairs:  # the package ends the process for some that do not fit
        if len(pair) != 2 or not {*pair, "".join(pair)} <= ids.keys():
            raise ConfigError(
                f"{merges} merges {shown(' '.join(pair))}, which are no two tokens of {vocab} that "
                f"make a third; {instead}"
            )
    try:
        package: Any = import_module("tokenizers")
    except ImportError as error:
        raise BackendUnavailable(
            f"the tokenizer {vocab} needs the package tokenizers ({error}); use {pip_install('hf')}"
        ) from error
    try:
        model = package.Tokenizer(package.models.BPE(vocab=ids, merges=pairs))
    except Exception as error:  # of any kind, for a merge of tokens that are not there
        raise ConfigError(
            f"{vocab} and {merges} do not fit ({cut(str(error))}); {instead}"
        ) from error
    model.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = package.decoders.ByteLevel()
    if END in ids:
        model.add_special_tokens([END])
    return BytePairs(model, ids.get(END), max(ids.values(), default=-1) + 1)
