"""The rows a rank receives, in legs: its own, and those of some of the other ranks.

Rows are ordered by the distance of their source rank: those of this rank (distance 0), of the next
rank (1), and so on, in a ring. On 4 ranks, seen by rank 2, with the other ranks in two legs:

    source ranks, by rank        0 1 2 3
    source ranks, by distance    2 | 3 0 | 1     own rows, distances 1 and 2, distance 3

In the leg of distance d a rank receives from the rank at distance d, and sends to the rank at
distance -d. So in every leg all ranks both send and receive, and agree on who their partners are.
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
    """Consecutive rows among those received, which are ordered by distance."""

    rows: slice
    distances: range  # of the source ranks; empty for this rank's own rows


class Trip:
    """The exchange of one call's rows with the ranks that compute them, leg by leg, and back.

    It lives until the backward. It holds the dispatcher and row counts, but no tensors.
    """

    def __init__(self, dispatcher: PeerDispatcher, packed: Packed, num_chunks: int) -> None:
        self.dispatcher, self.rank, self.size = dispatcher, packed.rank, len(packed.sent)
        self.sent, self.received, self.to_all = packed.sent, packed.received, packed.to_all
        self.choices = packed.choices
        self.shift = sum(packed.received[: packed.rank])  # rows received from lower ranks
        by_distance = [packed.received[self._source(d)] for d in range(self.size)]
        starts = [0, *accumulate(by_distance)]  # first row of each distance
        self.num_received, others = starts[-1], self.size - 1
        bounds = [1 + others * chunk // num_chunks for chunk in range(num_chunks + 1)]
        self.own = Leg(slice(0, starts[1]), range(0))
        self.others = [Leg(slice(starts[a], starts[b]), range(a, b)) for a, b in pairwise(bounds)]
        self.legs = [self.own, *self.others]  # in the order of their rows

    def num_choices(self, leg: Leg | None = None) -> int | None:
        """Return the number of local choices in `leg`, or in all legs; None if unknown."""
        if self.choices is None:
            return None
        if leg is None:
            return sum(self.choices)
        return sum(self.choices[self._source(d)] for d in leg.distances or [0])

    def away(self, sources: Sequence[Tensor], leg: Leg) -> Pending[list[Tensor]]:
        """Start sending rows of `sources` [P, ...] each; the result gives the rows of `leg`.

        This rank sends the rows that belong to the same leg on the other ranks.
        """
        split = [[s] * self.size if self.to_all else torch.split(s, self.sent) for s in sources]
        rows = [list(of_rank) for of_rank in zip(*split, strict=True)]
        if not leg.distances:
            return Pending(lambda: rows[self.rank])
        outs = {self._target(d): rows[self._target(d)] for d in leg.distances}
        ins = {self._source(d): self.received[self._source(d)] for d in leg.distances}
        return self.dispatcher.swap(outs, ins, leg.rows.start - self.own.rows.stop)

    def home(self, rows: Sequence[Tensor], leg: Leg) -> Pending[list[Tensor]]:
        """Start sending the leg's `rows` back; the result gives this rank's rows of that leg."""
        if not leg.distances:
            return Pending(lambda: list(rows))
        sources = [self._source(d) for d in leg.distances]
        counts = [self.received[source] for source in sources]
        split = [torch.split(tensor, counts) for tensor in rows]
        outs = dict(zip(sources, zip(*split, strict=True), strict=True))
        ins = {self._target(d): self.sent[self._target(d)] for d in leg.distances}
        before = sum(self.sent[self._target(d)] for d in range(1, leg.distances.start))
        # Written after the rows of the way out, which may still be read.
        return self.dispatcher.swap(outs, ins, self.num_received - self.own.rows.stop + before)

    def collected(self, homes: Mapping[Leg, Tensor]) -> Tensor:
        """Return the rows that came home with all legs, in the order they were packed: [P, ...]."""
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
    """Start sending `source` [P, H], a tensor or an e4m3 record, in all legs.

    The legs of other ranks start first, the own leg last.
    """
    sources = parts_of(source)

    def away(leg: Leg) -> Pending[Any]:
        started = trip.away([as_bytes(tensor) for tensor in sources], leg)

        def wait() -> Any:
            came = zip(started.wait(), sources, strict=True)
            return whole_of(type(source), [rows.view(like.dtype) for rows, like in came])

        return Pending(wait)

    return {leg: away(leg) for leg in (*trip.others, trip.own)}


def collected(trip: Trip, homes: Mapping[Leg, Pending[list[Tensor]]]) -> list[Tensor]:
    """Wait for all legs; return each tensor that came home, in the order it was packed."""
    rows = {leg: home.wait() for leg, home in homes.items()}
    number = len(next(iter(rows.values())))
    return [trip.collected({leg: came[i] for leg, came in rows.items()}) for i in range(number)]


def as_bytes(tensor: Tensor) -> Tensor:
    """Return an e4m3 `tensor` as uint8, which every backend can send; others unchanged."""
    return tensor.view(torch.uint8) if tensor.itemsize == 1 else tensor
