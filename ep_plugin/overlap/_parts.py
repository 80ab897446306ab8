"""The rows a rank receives, in parts: its own, and those of some of the other ranks.

Rows lie by distance here: those of this rank, of the next one, ..., of the one before it. On 4
ranks, seen by rank 2, with the other ranks in two parts:

    received, by rank        0 1 2 3
    received, by distance    2 | 3 0 | 1       own rows, distance 1 and 2, distance 3

What a rank receives from the rank at distance d it computes while the rank at distance -d computes
what this one has sent; so every part is a balanced exchange, and all ranks agree on its partners.
"""

from dataclasses import dataclass
from itertools import accumulate, pairwise

from torch import Tensor

from ep_plugin.contracts import Packed, PeerDispatcher, Pending


@dataclass(frozen=True, eq=False)
class Part:
    """Consecutive rows of those received, by distance."""

    rows: slice
    distances: range  # of the ranks they come from; empty for this rank's own


class Trip:
    """The way of one call's rows to the ranks that compute them, part by part, and home.

    It lives until the backward, and holds numbers alone.
    """

    def __init__(self, dispatcher: PeerDispatcher, packed: Packed, num_chunks: int) -> None:
        self.dispatcher, self.rank, self.size = dispatcher, packed.rank, len(packed.sent)
        self.shift = sum(packed.received[: packed.rank])  # rows of lower ranks
        by_distance = [packed.received[self._source(d)] for d in range(self.size)]
        self._received = [0, *accumulate(by_distance)]  # row at which each distance's start
        self._sent = [0, *accumulate(packed.sent)]  # row at which each rank's start
        own, others = by_distance[0], self.size - 1
        half = own // 2
        bounds = [1 + others * chunk // num_chunks for chunk in range(num_chunks + 1)]
        self.own = [Part(slice(0, half), range(0)), Part(slice(half, own), range(0))]
        self.others = [
            Part(slice(self._received[a], self._received[b]), range(a, b))
            for a, b in pairwise(bounds)
        ]
        self.parts = [*self.own, *self.others]  # as their rows lie

    @property
    def num_received(self) -> int:
        return self._received[-1]

    def away(self, source: Tensor, target: Tensor, part: Part) -> Pending[None]:
        """Start moving the part's rows from where they are `source` [P, ...] to `target` [N, ...].

        This rank sends what others count to the same part.
        """
        if not part.distances:
            target[part.rows] = source[self._own(part)]
            return Pending(lambda: None)
        outs = {self._target(d): source[self._sent_to(d)] for d in part.distances}
        ins = {self._source(d): target[self._received_from(d)] for d in part.distances}
        return self.dispatcher.swap(outs, ins)

    def home(self, rows: Tensor, target: Tensor, part: Part) -> Pending[None]:
        """Start moving the part's `rows` back to where they came from, into `target` [P, ...]."""
        if not part.distances:
            target[self._own(part)] = rows
            return Pending(lambda: None)
        first = part.rows.start
        outs = {self._source(d): rows[self._received_from(d, first)] for d in part.distances}
        ins = {self._target(d): target[self._sent_to(d)] for d in part.distances}
        return self.dispatcher.swap(outs, ins)

    def _source(self, distance: int) -> int:
        return (self.rank + distance) % self.size

    def _target(self, distance: int) -> int:
        return (self.rank - distance) % self.size

    def _own(self, part: Part) -> slice:
        first = self._sent[self.rank]
        return slice(first + part.rows.start, first + part.rows.stop)

    def _sent_to(self, distance: int) -> slice:
        rank = self._target(distance)
        return slice(self._sent[rank], self._sent[rank + 1])

    def _received_from(self, distance: int, first: int = 0) -> slice:
        return slice(self._received[distance] - first, self._received[distance + 1] - first)
