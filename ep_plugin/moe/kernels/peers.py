"""Rows written to, and summed from, the buffers of other GPUs over NVLink, by loads and stores.

A fixed number of programs loops over all tokens. So a copy occupies only as many SMs as it is
given, and the other SMs compute. A load over NVLink takes about two microseconds. To hide that,
each program already loads its next tile of rows (num_stages) while it works on one. See
`peers_torch` for the layout of the buffers.
"""

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ep_plugin.moe.kernels._launch import jit, next_power_of_2
from ep_plugin.moe.kernels.peers_torch import Peers

STAGES = 3  # load the places; load the rows they name; work on the rows
PLACES = 2048  # most places of a tile; they take shared memory beside its rows
WARPS = 16
UNITS = (torch.int64, torch.int32, torch.int16, torch.uint8)  # integers that rows are moved as


class _Tile(NamedTuple):
    """The part of the rows that a program works on at a time."""

    rows: int
    block: int  # columns

    @classmethod
    def of(cls, rows: Tensor, ranks: int, num_bytes: int) -> "_Tile":
        """Return a tile of `rows` [T, W] of at most `num_bytes` and at most PLACES places."""
        size = rows.element_size()
        block = min(next_power_of_2(rows.shape[1]), 2048 // size)
        most = max(1, PLACES // next_power_of_2(ranks))
        return cls(min(num_bytes // (block * size), most), block)


def push_tile(rows: Tensor, ranks: int) -> _Tile:
    return _Tile.of(rows, ranks, 32768)


def sum_tile(rows: Tensor, ranks: int) -> _Tile:
    """Return the tile for `sum_rows`: shared memory holds two tiles of each rank."""
    return _Tile.of(rows, ranks, max(2048, 65536 // next_power_of_2(ranks)))


@jit
def _push_kernel(
    rows, addresses, offset, place, num_rows, WIDTH,
    RANKS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    unit = tl.pointer_type(rows.dtype.element_ty)
    blocks = tl.cdiv(WIDTH, BLOCK)
    tiles = tl.cdiv(num_rows, ROWS) * blocks
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES):
        row = (tile // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        column = (tile % blocks) * BLOCK + tl.arange(0, BLOCK)[None, :]
        inside = (row < num_rows)[:, None] & (column < WIDTH)
        values = tl.load(rows + row[:, None] * WIDTH + column, mask=inside)
        for rank in tl.static_range(RANKS):
            to = tl.load(place + row * RANKS + rank, mask=row < num_rows, other=-1).to(tl.int64)
            # A buffer and the tensors in it start at multiples of 16 bytes.
            start = tl.multiple_of((tl.load(addresses + rank) + offset).to(unit), 16)
            target = start + to[:, None] * WIDTH + column
            tl.store(target, values, mask=inside & (to >= 0)[:, None])


def push_rows(rows: Tensor, peers: Peers, offset: int, place: Tensor, programs: int) -> None:
    """Write each row of `rows` [T, W] to the buffers of all ranks that `place` names.

    `place` [T, G] int32 is the row in each rank's buffer, -1 for not sent. `offset` is in bytes.
    `programs` is the number of SMs that copy.
    """
    if not rows.numel():
        return
    size = rows.shape[1] * rows.element_size()
    moved = rows.view(next(unit for unit in UNITS if size % unit.itemsize == 0))
    tile = push_tile(moved, place.shape[1])
    _push_kernel[(programs,)](
        *(moved, peers.addresses, offset, place, len(moved), moved.shape[1]),
        RANKS=place.shape[1],
        ROWS=tile.rows,
        BLOCK=tile.block,
        STAGES=STAGES,
        num_warps=WARPS,
    )


@jit
def _sum_home_kernel(
    out, addresses, offset, place, num_rows, WIDTH,
    RANKS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    element = out.dtype.element_ty
    blocks = tl.cdiv(WIDTH, BLOCK)
    tiles = tl.cdiv(num_rows, ROWS) * blocks
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES):
        row = (tile // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        column = (tile % blocks) * BLOCK + tl.arange(0, BLOCK)[None, :]
        inside = (row < num_rows)[:, None] & (column < WIDTH)
        total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
        for rank in tl.static_range(RANKS):
            at = tl.load(place + row * RANKS + rank, mask=row < num_rows, other=-1).to(tl.int64)
            start = (tl.load(addresses + rank) + offset).to(tl.pointer_type(element))
            source = tl.multiple_of(start, 16) + at[:, None] * WIDTH + column
            total += tl.load(source, mask=inside & (at >= 0)[:, None], other=0.0).to(tl.float32)
        tl.store(out + row[:, None] * WIDTH + column, total.to(element), mask=inside)


def sum_rows(like: Tensor, peers: Peers, offset: int, place: Tensor, programs: int) -> Tensor:
    """Return for each token the sum of its rows in the ranks' buffers: [T, W].

    `place` [T, G] int32 is the row in each rank's buffer, -1 for none. Rows are added in rank
    order, in fp32. Width and dtype are those of `like` [*, W]. `offset` is in bytes, `programs`
    the number of SMs that sum.
    """
    out = like.new_empty(len(place), like.shape[1])
    if out.numel():
        ranks = place.shape[1]
        tile = sum_tile(out, ranks)
        _sum_home_kernel[(programs,)](
            *(out, peers.addresses, offset, place, len(out), out.shape[1]),
            RANKS=ranks,
            ROWS=tile.rows,
            BLOCK=tile.block,
            STAGES=STAGES,
            num_warps=WARPS,
        )
    return out
