"""Weight gradients: products over the rows of each expert, of e4m3 columns or of bf16 rows.

They are written as bf16, or added to fp32 totals in the epilogue of the product. If the product
writes bf16, the training loop adds it to its fp32 totals afterwards: 12 bytes of traffic per
weight. Adding in the epilogue moves 8. With many experts of few rows each, a weight gradient costs
this traffic, not arithmetic.

One program owns one tile of one expert's matrix and adds it once. There are no atomics, so every
run gives the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ep_plugin.moe.e4m3 import Columns8
from ep_plugin.moe.kernels._launch import cdiv, jit
from ep_plugin.moe.kernels.tiles import in_bands, span, tiled
from ep_plugin.moe.kernels.types import TILE, Tiles

WIDE = 256  # columns of a tile; it has TILE rows
# With few rows of each expert a tile's sums take less time than it takes to write them, or to read
# and write its totals. Narrow tiles are two to a multiprocessor: one computes while the other waits
# for memory.
NARROW = 128
MANY_ROWS = 1024  # of an expert on average: from here on tiles are wide
BAND = 8  # rows of tiles in a band, see `tiles.in_bands`


@triton.jit
def corner(B, A, TILE: tl.constexpr, WIDE: tl.constexpr, BAND: tl.constexpr):
    """Return the first row and column of this program's tile in its expert's matrix."""
    down, across = (B + TILE - 1) // TILE, (A + WIDE - 1) // WIDE
    tile_b, tile_a = in_bands(tl.program_id(0), down, across, BAND)
    return tile_b * TILE, tile_a * WIDE


@triton.jit
def store_tile(
    out, sums, expert, first_b, first_a, end_b, B, A,
    ADD: tl.constexpr, TILE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Write `sums`, a tile of an expert's matrix, to `out` [e, B, A], or add it with ADD.

    Rows from `end_b` on, and columns from A on, are not written.
    """
    b = first_b + tl.arange(0, TILE)
    a = first_a + tl.arange(0, WIDE)
    owned = (b < end_b)[:, None] & (a < A)[None, :]
    target = out + (expert.to(tl.int64) * B + b)[:, None] * A + a[None, :]
    if ADD:
        sums += tl.load(target, mask=owned, other=0.0)
    tl.store(target, sums.to(out.dtype.element_ty), mask=owned)


@triton.jit
def _deliver(
    out, sums, expert, first_b, first_a, B, A,
    ADD: tl.constexpr, TILE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    # In halves: the registers do not hold a whole tile of sums and the totals to add them to.
    halves = tl.permute(tl.reshape(sums, (TILE, 2, WIDE // 2)), (0, 2, 1))
    left, right = tl.split(halves)
    store_tile(out, left, expert, first_b, first_a, B, B, A, ADD, TILE, WIDE // 2)
    store_tile(out, right, expert, first_b, first_a + WIDE // 2, B, B, A, ADD, TILE, WIDE // 2)


@jit
def _wgrad8_kernel(
    left, right, left_scale, right_scale, tile_ends, out, B, A,
    ADD: tl.constexpr, TILE: tl.constexpr, WIDE: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(1)
    start, end = span(tile_ends, expert)
    if ADD:  # noqa: SIM102
        if start >= end:
            return
    first_b, first_a = corner(B, A, TILE, WIDE, BAND)
    sums = tl.zeros((TILE, WIDE), tl.float32)
    for step in range(start, end):  # an expert's columns are whole tiles
        x = left.load([first_b, step * TILE])
        y = right.load([first_a, step * TILE])
        sums = tl.dot(x, y.T, sums)
    sums *= tl.load(left_scale + expert) * tl.load(right_scale + expert)
    _deliver(out, sums, expert, first_b, first_a, B, A, ADD, TILE, WIDE)


def multiply_columns(left: Columns8, right: Columns8, tiles: Tiles) -> Tensor:
    """Return for each expert `left` [b, P] @ `right` [a, P].T over its columns: [e, b, a] bf16."""
    size = tiles.ends.shape[0], left.data.shape[0], right.data.shape[0]
    out = torch.empty(size, dtype=torch.bfloat16, device=tiles.ends.device)
    _columns(out, left, right, tiles, add=False)
    return out


def add_wgrad8(total: Tensor, left: Columns8, right: Columns8, tiles: Tiles) -> None:
    """Add each expert's `left` [b, P] @ `right` [a, P].T to its part of `total` [e, b, a] fp32."""
    _columns(total, left, right, tiles, add=True)


def _columns(out: Tensor, left: Columns8, right: Columns8, tiles: Tiles, add: bool) -> None:
    if out.numel():
        wide = _wide(out, left.data.shape[1])
        _wgrad8_kernel[_grid(out, wide)](
            *(tiled(left.data, TILE, TILE), tiled(right.data, wide, TILE)),
            *(left.scale, right.scale, tiles.ends, out, *out.shape[1:]),
            ADD=add,
            TILE=TILE,
            WIDE=wide,
            BAND=BAND,
            num_warps=wide // 32,
            num_stages=4 if wide == WIDE else 3,
        )


@jit
def _wgrad_kernel(
    left, right, ends, total, B, A,
    TILE: tl.constexpr, WIDE: tl.constexpr, DEPTH: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(1)
    start, end = span(ends, expert)
    if start >= end:
        return
    first_b, first_a = corner(B, A, TILE, WIDE, BAND)
    sums = tl.zeros((TILE, WIDE), tl.float32)
    rest = start + (end - start) // DEPTH * DEPTH
    for row in range(start, rest, DEPTH):
        x = left.load([row, first_b])
        y = right.load([row, first_a])
        sums = tl.dot(x.T, y, sums)
    if rest < end:  # the last load includes rows of the next expert, which are masked
        mine = (rest + tl.arange(0, DEPTH) < end)[:, None]
        x = tl.where(mine, left.load([rest, first_b]), 0.0)
        y = tl.where(mine, right.load([rest, first_a]), 0.0)
        sums = tl.dot(x.T, y, sums)
    _deliver(total, sums, expert, first_b, first_a, B, A, True, TILE, WIDE)


def add_wgrad(total: Tensor, left: Tensor, right: Tensor, ends: Tensor) -> None:
    """Add, for each expert's rows, `left` [R, b].T @ `right` [R, a] to `total` [e, b, a] fp32.

    `left` and `right` are bf16; b and a are multiples of 8. `ends` [e] int32 is the row after each
    expert's last.
    """
    if total.numel() and left.numel():
        depth, wide = 64, _wide(total, left.shape[0])
        _wgrad_kernel[_grid(total, wide)](
            *(tiled(left.contiguous(), depth, TILE), tiled(right.contiguous(), depth, wide)),
            *(ends, total, *total.shape[1:]),
            TILE=TILE,
            WIDE=wide,
            DEPTH=depth,
            BAND=BAND,
            num_warps=wide // 32,
            num_stages=3,
        )


def _wide(out: Tensor, num_rows: int) -> int:
    """Return the columns of a tile of `out` [e, b, a], which is of `num_rows` rows."""
    return WIDE if num_rows >= MANY_ROWS * out.shape[0] else NARROW


def _grid(out: Tensor, wide: int) -> tuple[int, int]:
    num_experts, b, a = out.shape
    return cdiv(b, TILE) * cdiv(a, wide), num_experts
