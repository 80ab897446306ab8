"""The tokens that two models are compared on: prompts of the user's, or random ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ep_plugin.checkpoint.text import Tokenizer, hugging_face
from ep_plugin.errors import ConfigError
from ep_plugin.untrusted import parse_json, read_text

MAX_SEQUENCE = 256
MAX_PROMPTS = 4096
REMEDY = "use a file of text with a prompt a line, or a .json file such as [[1, 2, 3]]"
Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True)
class TokenBatch:
    """`tokens` [B, S] int64, and which of them count: `kept` [B, S] bool.

    Attention is causal, so what fills a short prompt up on its right changes nothing before it.
    """

    tokens: Tensor
    kept: Tensor

    def max_abs(self, values: Tensor) -> float:
        """Return the largest absolute value of `values` [B, S, X] over tokens that count."""
        return float(values[self.kept].abs().max())


def read_prompts(path: Path, tokenizer: Path | None) -> list[list[int]]:
    """Return the token ids of each prompt in a file.

    A .json file has lists of ids; any other text, a prompt a line, for the tokenizer in the
    Hugging Face folder `tokenizer`. Raises ConfigError for a file that cannot be read or is empty.
    """
    text = read_text(path, REMEDY)
    if path.suffix == ".json":
        prompts = parse_json(text, f"--prompts {path}", REMEDY, list)
    else:
        lines = [line for line in text.splitlines() if line.strip()]
        _check_count(path, len(lines))
        loaded = _load_tokenizer(path, tokenizer) if lines else None
        prompts = [] if loaded is None else [loaded.encode(line) for line in lines]
    _check_count(path, len(prompts))
    if not _are_ids(prompts):
        raise ConfigError(
            f"--prompts {path} must hold at least one prompt, in .json as a list of lists of token "
            "ids such as [[1, 2, 3]]"
        )
    return [list(prompt) for prompt in prompts]


def _check_count(path: Path, count: int) -> None:
    if count > MAX_PROMPTS:
        raise ConfigError(
            f"--prompts {path} has {count} prompts, and each is run through both models; use "
            f"{MAX_PROMPTS} at most"
        )


def _are_ids(prompts: Any) -> bool:
    lists = isinstance(prompts, list) and all(isinstance(prompt, list) for prompt in prompts)
    return (
        lists
        and bool(prompts)
        and all(
            prompt and all(type(token) is int and token >= 0 for token in prompt)
            for prompt in prompts
        )
    )


def _load_tokenizer(path: Path, folder: Path | None) -> Tokenizer:
    if folder is None:
        raise ConfigError(
            f"--prompts {path} is text, and --from is no Hugging Face folder with a tokenizer; use "
            "a .json file with lists of token ids"
        )
    instead = "use a file of token ids, .json"
    return hugging_face(folder, True, "--prompts", str(folder), instead)


def fill(prompts: Prompts, vocab_size: int, max_length: int) -> TokenBatch:
    """Return `prompts`, cut at MAX_SEQUENCE and `max_length`. Raises ConfigError for other ids."""
    largest = max(max(prompt) for prompt in prompts)
    if largest >= vocab_size:
        raise ConfigError(
            f"--prompts has token {largest}, and the vocabulary has {vocab_size}; use ids "
            f"from 0 to {vocab_size - 1}"
        )
    limit = min(max_length, MAX_SEQUENCE)
    length = min(max(map(len, prompts)), limit)
    tokens = torch.zeros(len(prompts), length, dtype=torch.int64)
    kept = torch.zeros(len(prompts), length, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        part = torch.tensor(prompt[:length])
        tokens[row, : len(part)], kept[row, : len(part)] = part, True
    return TokenBatch(tokens, kept)


def draw(num_tokens: int, vocab_size: int, max_length: int, seed: int) -> TokenBatch:
    """Return at least `num_tokens` random tokens, as long sequences as are allowed."""
    length = min(max_length, MAX_SEQUENCE)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocab_size, (-(-num_tokens // length), length), generator=generator)
    return TokenBatch(tokens, torch.ones_like(tokens, dtype=torch.bool))
