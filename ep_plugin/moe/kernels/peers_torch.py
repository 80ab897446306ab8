"""Rows written to and summed from the buffers of other ranks: plain torch, beside `peers`.

Every rank of a group has a buffer that all of them address. At the same `offset` in bytes of each
lie its rows [n, W] of one tensor; `place` [T, G] says where in it a token's row is, -1 for nowhere.
Two tokens, two ranks, places (0 1) and (1 -):

    rank 0    a b           pushed from a b, or summed to a+a' b
    rank 1    . a'
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Peers(NamedTuple):
    """The buffers of a group's ranks, in rank order, as this process sees them."""

    buffers: tuple[Tensor, ...]  # uint8 [bytes] each
    addresses: Tensor  # [G] int64, of their first bytes


def rows_of(buffer: Tensor, offset: int, num_rows: int, like: Tensor) -> Tensor:
    """Return the view [num_rows, W] of `buffer` at `offset` with width and dtype of `like`."""
    size = num_rows * like.shape[1] * like.element_size()
    return buffer[offset : offset + size].view(like.dtype).view(num_rows, like.shape[1])


def _rows_at(buffer: Tensor, offset: int, place: Tensor, like: Tensor) -> Tensor:
    """Return the rows up to the last that `place` [n] names."""
    return rows_of(buffer, offset, int(place.max()) + 1 if len(place) else 0, like)


def push_rows(rows: Tensor, peers: Peers, offset: int, place: Tensor, programs: int) -> None:
    """Write each row of `rows` [T, W] to its places [T, G] int32 in the ranks' buffers.

    `programs` is the number of a GPU's SMs that work on it.
    """
    for buffer, column in zip(peers.buffers, place.unbind(1), strict=True):
        sent = column >= 0
        to = column[sent].long()
        _rows_at(buffer, offset, to, rows)[to] = rows[sent]


def sum_rows(like: Tensor, peers: Peers, offset: int, place: Tensor, programs: int) -> Tensor:
    """Return [T, W]: the sums, in rank order, of the rows at `place` [T, G] int32.

    Width and dtype are those of `like` [*, W]; the sums are in fp32 at least.
    """
    found = like.new_zeros(*place.shape, like.shape[1])  # [T, G, W]
    for rank, (buffer, column) in enumerate(zip(peers.buffers, place.unbind(1), strict=True)):
        sent = column >= 0
        at = column[sent].long()
        found[sent, rank] = _rows_at(buffer, offset, at, like)[at]
    return torch.sum(found, dim=1)
