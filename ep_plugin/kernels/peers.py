"""Rows written to and summed from the buffers of other GPUs, over NVLink, by loads and stores.

A few programs walk over all tokens, so that a copy takes as many SMs as it is given and the others
compute. A link answers after about two microseconds: a program therefore has a tile of several rows
under way at once. See `peers_torch` for the layout.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ep_plugin.kernels._launch import jit
from ep_plugin.kernels.peers_torch import Peers

PUSHED = 8192  # elements of a program's tile: moved in units of up to 8 bytes
SUMMED = 16384  # elements of a program's tile, each with its fp32 sum
UNITS = (torch.int64, torch.int32, torch.int16, torch.uint8)


@jit
def _push_kernel(
    rows, addresses, offset, place, num_rows, WIDTH,
    RANKS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    unit = tl.pointer_type(rows.dtype.element_ty)
    column = tl.arange(0, BLOCK)[None, :]
    step = tl.num_programs(0) * ROWS
    for first in range(tl.program_id(0) * ROWS, num_rows, step):
        row = first + tl.arange(0, ROWS).to(tl.int64)
        inside = (row < num_rows)[:, None] & (column < WIDTH)
        values = tl.load(rows + row[:, None] * WIDTH + column, mask=inside)
        for rank in range(RANKS):
            to = tl.load(place + row * RANKS + rank, mask=row < num_rows, other=-1).to(tl.int64)
            # A buffer and the tensors in it start at multiples of 16 bytes.
            start = tl.multiple_of(tl.load(addresses + rank) + offset, 16).to(unit)
            target = start + to[:, None] * WIDTH + column
            tl.store(target, values, mask=inside & (to >= 0)[:, None])


def push_rows(rows: Tensor, peers: Peers, offset: int, place: Tensor, programs: int) -> None:
    """Write each row of `rows` [T, W] to its places [T, G] int32 in the ranks' buffers."""
    if not rows.numel():
        return
    size = rows.shape[1] * rows.element_size()
    moved = rows.view(next(unit for unit in UNITS if size % unit.itemsize == 0))
    block = triton.next_power_of_2(moved.shape[1])
    _push_kernel[(programs,)](
        *(moved, peers.addresses, offset, place, len(moved), moved.shape[1]),
        RANKS=place.shape[1],
        ROWS=max(1, PUSHED // block),
        BLOCK=block,
        num_warps=16,
    )


@jit
def _sum_kernel(
    out, addresses, offset, place, num_rows, WIDTH,
    RANKS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    element = out.dtype.element_ty
    column = tl.arange(0, BLOCK)[None, :]
    step = tl.num_programs(0) * ROWS
    for first in range(tl.program_id(0) * ROWS, num_rows, step):
        row = first + tl.arange(0, ROWS).to(tl.int64)
        inside = (row < num_rows)[:, None] & (column < WIDTH)
        total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
        for rank in tl.static_range(RANKS):  # unrolled: the ranks' rows are asked for together
            at = tl.load(place + row * RANKS + rank, mask=row < num_rows, other=-1).to(tl.int64)
            start = tl.multiple_of(tl.load(addresses + rank) + offset, 16)
            source = start.to(tl.pointer_type(element)) + at[:, None] * WIDTH + column
            total += tl.load(source, mask=inside & (at >= 0)[:, None], other=0.0).to(tl.float32)
        tl.store(out + row[:, None] * WIDTH + column, total.to(element), mask=inside)


def sum_rows(like: Tensor, peers: Peers, offset: int, place: Tensor, programs: int) -> Tensor:
    """Return [T, W]: the fp32 sums, in rank order, of the rows at `place` [T, G] int32."""
    out = like.new_empty(len(place), like.shape[1])
    if out.numel():
        block = triton.next_power_of_2(out.shape[1])
        _sum_kernel[(programs,)](
            *(out, peers.addresses, offset, place, len(out), out.shape[1]),
            RANKS=place.shape[1],
            ROWS=max(1, SUMMED // block),
            BLOCK=block,
            num_warps=16,
        )
    return out
