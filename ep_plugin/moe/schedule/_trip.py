"""The rows a rank receives, in legs: its own, and those of some of the other ranks.

Rows lie by distance here: those of this rank, of the next one, ..., of the one before it. On 4
ranks, seen by rank 2, with the other ranks in two legs:

    received, by rank        0 1 2 3
    received, by distance    2 | 3 0 | 1       own rows, distance 1 and 2, distance 3

What a rank receives from the rank at distance d it computes while the rank at distance -d computes
what this one has sent; so every leg is a balanced exchange, and all ranks agree on its partners.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from ep_plugin.moe.experts.fused import parts_of, whole_of
from ep_plugin.moe.interfaces import Packed, PeerDispatcher, Pending
from ep_plugin.moe.kernels import select


@dataclass(frozen=True, eq=False)
class Leg:
    """Consecutive rows of those received, by distance."""

    rows: slice
    distances: range  # of the ranks they come from; empty for this rank's own


class Trip:
    """The way of one call's rows to the ranks that compute them, leg by leg, and home.

    It lives until the backward, and holds numbers alone.
    """

    def __init__(self, dispatcher: PeerDispatcher, packed: Packed, num_chunks: int) -> None:
        self.dispatcher, self.rank, self.size = dispatcher, packed.rank, len(packed.sent)
        self.sent, self.received, self.to_all = packed.sent, packed.received, packed.to_all
        self.choices = packed.choices
        self.shift = sum(packed.received[: packed.rank])  # rows of lower ranks
        by_distance = [packed.received[self._source(d)] for d in range(self.size)]
        starts = [0, *accumulate(by_distance)]  # row at which each distance's start
        self.num_received, others = starts[-1], self.size - 1
        bounds = [1 + others * chunk // num_chunks for chunk in range(num_chunks + 1)]
        self.own = Leg(slice(0, starts[1]), range(0))
        self.others = [Leg(slice(starts[a], starts[b]), range(a, b)) for a, b in pairwise(bounds)]
        self.legs = [self.own, *self.others]  # as their rows lie

    def num_choices(self, leg: Leg | None = None) -> int | None:
        """Return the choices of this rank's experts in the leg's rows, or all, if known."""
        if self.choices is None:
            return None
        if leg is None:
            return sum(self.choices)
        return sum(self.choices[self._source(d)] for d in leg.distances or [0])

    def away(self, sources: Sequence[Tensor], leg: Leg) -> Pending[list[Tensor]]:
        """Start moving the leg's rows from where they are `sources` [P, ...]; those that come.

        This rank sends what others count to the same leg.
        """
        split = [[s] * self.size if self.to_all else torch.split(s, self.sent) for s in sources]
        rows = [list(of_rank) for of_rank in zip(*split, strict=True)]
        if not leg.distances:
            return Pending(lambda: rows[self.rank])
        outs = {self._target(d): rows[self._target(d)] for d in leg.distances}
        ins = {self._source(d): self.received[self._source(d)] for d in leg.distances}
        return self.dispatcher.swap(outs, ins, leg.rows.start - self.own.rows.stop)

    def home(self, rows: Sequence[Tensor], leg: Leg) -> Pending[list[Tensor]]:
        """Start moving the leg's `rows` back to where they came from; those that come home."""
        if not leg.distances:
            return Pending(lambda: list(rows))
        sources = [self._source(d) for d in leg.distances]
        counts = [self.received[source] for source in sources]
        split = [torch.split(tensor, counts) for tensor in rows]
        outs = dict(zip(sources, zip(*split, strict=True), strict=True))
        ins = {self._target(d): self.sent[self._target(d)] for d in leg.distances}
        before = sum(self.sent[self._target(d)] for d in range(1, leg.distances.start))
        # What came on the way out may still be read.
        return self.dispatcher.swap(outs, ins, self.num_received - self.own.rows.stop + before)

    def collected(self, homes: Mapping[Leg, Tensor]) -> Tensor:
        """Return what came home with all legs as it was packed: [P, ...]."""
        pieces: dict[int, Tensor] = {}
        for leg in self.others:
            ranks = [self._target(d) for d in leg.distances]
            counts = [self.sent[rank] for rank in ranks]
            pieces |= zip(ranks, torch.split(homes[leg], counts), strict=True)
        pieces[self.rank] = homes[self.own]
        by_rank = [pieces[rank] for rank in range(self.size)]
        if not self.to_all:
            return torch.cat(by_rank)
        summed: Tensor = select(by_rank[0]).sum_pieces(by_rank)
        return summed

    def _source(self, distance: int) -> int:
        return (self.rank + distance) % self.size

    def _target(self, distance: int) -> int:
        return (self.rank - distance) % self.size


def set_out(trip: Trip, source: Any) -> dict[Leg, Pending[Any]]:
    """Start all of the way out for `source` [P, H], or a record of it; the network's leg first."""
    sources = parts_of(source)

    def away(leg: Leg) -> Pending[Any]:
        started = trip.away([as_bytes(tensor) for tensor in sources], leg)

        def wait() -> Any:
            came = zip(started.wait(), sources, strict=True)
            return whole_of(type(source), [rows.view(like.dtype) for rows, like in came])

        return Pending(wait)

    return {leg: away(leg) for leg in (*trip.others, trip.own)}


def collected(trip: Trip, homes: Mapping[Leg, Pending[list[Tensor]]]) -> list[Tensor]:
    """Return what came home with all legs, as it was packed."""
    rows = {leg: home.wait() for leg, home in homes.items()}
    number = len(next(iter(rows.values())))
    return [trip.collected({leg: came[i] for leg, came in rows.items()}) for i in range(number)]


def as_bytes(tensor: Tensor) -> Tensor:
    """Return e4m3 as bytes, which every backend can send."""
    return tensor.view(torch.uint8) if tensor.itemsize == 1 else tensor
