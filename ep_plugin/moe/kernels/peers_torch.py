"""Rows written to and summed from the buffers of other ranks: plain torch, beside `peers`.

Each of the G ranks of a group has a buffer that all of them can read and write. A tensor's rows
[n, W] start at the same `offset` in bytes in every buffer. `place` [T, G] int32 is the row of each
of the T tokens in each rank's buffer, -1 for none. Example: two tokens a and b, two ranks, `place`
(0, 1) for a and (1, -1) for b:

    buffer of rank 0    a  b         `push_rows` writes these rows from a, b
    buffer of rank 1    .  a'        `sum_rows` returns a + a', b
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Peers(NamedTuple):
    """The buffers of a group's ranks, in rank order, as this process sees them."""

    buffers: tuple[Tensor, ...]  # uint8 [bytes] each
    addresses: Tensor  # [G] int64, the address of each buffer's first byte


def rows_of(buffer: Tensor, offset: int, num_rows: int, like: Tensor) -> Tensor:
    """Return `num_rows` rows of `buffer` at `offset` (bytes): a view like `like` [*, W]."""
    size = num_rows * like.shape[1] * like.element_size()
    return buffer[offset : offset + size].view(like.dtype).view(num_rows, like.shape[1])


def _rows_at(buffer: Tensor, offset: int, place: Tensor, like: Tensor) -> Tensor:
    """Return the rows of `buffer` up to the last one that `place` [n] names."""
    return rows_of(buffer, offset, int(place.max()) + 1 if len(place) else 0, like)


def push_rows(rows: Tensor, peers: Peers, offset: int, place: Tensor, programs: int) -> None:
    """Write each row of `rows` [T, W] to the buffers of all ranks that `place` [T, G] names.

    `programs` is the number of SMs that copy; it has no meaning here.
    """
    for buffer, column in zip(peers.buffers, place.unbind(1), strict=True):
        sent = column >= 0
        to = column[sent].long()
        _rows_at(buffer, offset, to, rows)[to] = rows[sent]


def sum_rows(like: Tensor, peers: Peers, offset: int, place: Tensor, programs: int) -> Tensor:
    """Return for each token the sum of its rows at `place` [T, G], in rank order: [T, W].

    Width and dtype are those of `like` [*, W]; sums are taken in fp32 or wider.
    """
    found = like.new_zeros(*place.shape, like.shape[1])  # [T, G, W]
    for rank, (buffer, column) in enumerate(zip(peers.buffers, place.unbind(1), strict=True)):
        sent = column >= 0
        at = column[sent].long()
        found[sent, rank] = _rows_at(buffer, offset, at, like)[at]
    return torch.sum(found, dim=1)
