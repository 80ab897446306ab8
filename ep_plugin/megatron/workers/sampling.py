"""The next token of each text: the likeliest one, or one drawn from the likeliest ones."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; with `greedy` nothing else counts."""

    greedy: bool
    top_p: float
    temperature: float
    seed: int


def generators(sampling: Sampling, prompts: Sequence[Sequence[int]]) -> list[torch.Generator]:
    """Return a generator for each prompt, whatever other prompts stand beside it.

    Equal prompts draw differently: the second of them as the second of any two.
    """
    times: Counter[str] = Counter()
    made = []
    for prompt in prompts:
        words = " ".join(map(str, prompt))
        digest = hashlib.sha256(f"{sampling.seed} {times[words]} {words}".encode()).digest()
        times[words] += 1
        made.append(torch.Generator().manual_seed(int.from_bytes(digest[:7], "big")))
    return made


def choose(logits: Tensor, sampling: Sampling, drawn: Sequence[torch.Generator]) -> list[int]:
    """Return the next token of each row of `logits` [B, V], on any device."""
    logits = logits.double().cpu()
    if sampling.greedy:
        ids: list[int] = logits.argmax(dim=-1).tolist()
        return ids
    return [_draw(row, sampling, each) for row, each in zip(logits, drawn, strict=True)]


def _draw(row: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Draw from the fewest likeliest tokens of `row` [V] whose probabilities sum to top_p."""
    probs, ids = (row / sampling.temperature).softmax(dim=-1).sort(descending=True, stable=True)
    sums = probs.cumsum(dim=-1)
    kept = max(1, int((sums - probs < sampling.top_p).sum()))
    point = torch.rand((), generator=generator, dtype=torch.float64) * sums[kept - 1]
    place = min(int(torch.searchsorted(sums[:kept], point, right=True)), kept - 1)
    return int(ids[place])
