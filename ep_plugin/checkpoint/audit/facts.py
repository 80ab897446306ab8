"""What is read of each tensor, one chunk in memory at a time."""

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ep_plugin.checkpoint.audit.stored_names import Name, parse
from ep_plugin.checkpoint.tensors import Chunk, Damaged, Stored

Place = tuple[int | None, int | None]  # layer, expert
# Where in one expert's tensor a part begins, how large it is, and a digest: of a weight's bytes, or
# the sum of a moment, which is quicker.
Part = tuple[tuple[int, ...], tuple[int, ...], str]

MASTERS = (None, "param", "fp32_param")  # the weights themselves: model's and optimizer's


@dataclass
class Facts:
    """What one tensor's values say; by layer and expert where it has them."""

    dtypes: set[str] = field(default_factory=set)
    unreadable: list[str] = field(default_factory=list)
    nonfinite: dict[Place, int] = field(default_factory=dict)
    nonzero: set[Place] = field(default_factory=set)  # of experts: where any value is not 0
    parts: dict[Place, set[Part]] = field(default_factory=dict)  # of experts' weights and moments


def read_facts(stored: Stored, key: str) -> Facts:
    """Read one tensor. What cannot be read is a fact too."""
    name, facts = parse(key), Facts()
    for chunk in dict.fromkeys(stored.chunks[key]):
        try:
            values = stored.read_chunk(key, chunk)
        except Damaged as error:
            facts.unreadable.append(str(error))
            continue
        facts.dtypes.add(str(values.dtype))
        for place, offsets, part in _by_place(name, chunk, values):
            _look(facts, name, place, offsets, part)
    return facts


def _look(facts: Facts, name: Name, place: Place, offsets: tuple[int, ...], part: Tensor) -> None:
    if part.is_floating_point() and name.bucket is None:  # buckets are padded with anything
        numbers = part if part.dtype.itemsize > 1 else part.float()  # fp8 has no isfinite
        wrong = part.numel() - int(torch.isfinite(numbers).sum())
        if wrong:
            facts.nonfinite[place] = facts.nonfinite.get(place, 0) + wrong
    if name.block is None:
        return
    if name.state is not None and bool((part != 0).any()):
        facts.nonzero.add(place)
    if name.is_weight:
        digest = _digest(part) if name.state in MASTERS else repr(_sum(part))
        facts.parts.setdefault(place, set()).add((offsets, tuple(part.shape), digest))


def _digest(part: Tensor) -> str:
    content = part.contiguous().view(torch.uint8).numpy()
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _sum(part: Tensor) -> float:
    numbers = part if part.dtype.itemsize > 1 else part.float()  # fp8 has no sum
    return float(numbers.sum(dtype=torch.float64))


def _by_place(
    name: Name, chunk: Chunk, values: Tensor
) -> Iterator[tuple[Place, tuple[int, ...], Tensor]]:
    """Yield the chunk's values by layer and expert, with where each begins in one's own tensor."""
    lead = name.lead
    if lead > len(chunk.offsets):
        yield (None, None), chunk.offsets, values
        return
    for index in itertools.product(*map(range, values.shape[:lead])):
        begins = tuple(first + i for first, i in zip(chunk.offsets, index, strict=False))
        yield name.place(begins + chunk.offsets[lead:]), chunk.offsets[lead:], values[index]
