"""Weight gradients: products over the rows of each expert, of e4m3 columns or of bf16 rows.

They are written as bf16, or added to fp32 totals in the epilogue of the product. If the product
writes bf16, the training loop adds it to its fp32 totals afterwards: 12 bytes of traffic per
weight. Adding in the epilogue moves 8. With many experts of few rows each, a weight gradient costs
this traffic, not arithmetic.

Each tile of an expert's matrix is one program's, which adds or writes it once. There are no
atomics, so every run gives the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ep_plugin.moe.e4m3 import Columns8
from ep_plugin.moe.kernels._launch import cdiv, jit
from ep_plugin.moe.kernels.tiles import in_bands, num_programs, span, tiled, tiled_each
from ep_plugin.moe.kernels.types import TILE, Tiles

WIDE = 256  # columns of a tile; it has TILE rows
# With few rows of each expert a tile's sums take less time than it takes to write them, or to read
# and write its totals. Narrow tiles are two to a multiprocessor: one computes while the other waits
# for memory.
NARROW = 128
MANY_ROWS = 1024  # of an expert on average: from here on tiles are wide
# From here on a program goes on with the next tile where nothing is added, and does not end.
MANY_EXPERTS = 64
BAND = 8  # rows of tiles in a band, see `tiles.in_bands`
DEPTH = 64  # rows of bf16 in one step along the sum
PARTS = {WIDE: 4, NARROW: 2}  # of a tile, side by side, that are written one after the other


@triton.jit
def corner(tile, B, A, TILE: tl.constexpr, WIDE: tl.constexpr, BAND: tl.constexpr):
    """Return the first row and column of a tile in its expert's matrix."""
    down, across = (B + TILE - 1) // TILE, (A + WIDE - 1) // WIDE
    tile_b, tile_a = in_bands(tile, down, across, BAND)
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
def _halves(sums, TILE: tl.constexpr, WIDE: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(sums, (TILE, 2, WIDE // 2)), (0, 2, 1)))


@triton.jit
def _add(total, sums, expert, first_b, first_a, B, A, TILE: tl.constexpr, WIDE: tl.constexpr):
    # In halves: the registers do not hold a whole tile of sums and the totals to add them to.
    left, right = _halves(sums, TILE, WIDE)
    store_tile(total, left, expert, first_b, first_a, B, B, A, True, TILE, WIDE // 2)
    store_tile(total, right, expert, first_b, first_a + WIDE // 2, B, B, A, True, TILE, WIDE // 2)


@triton.jit
def _write(
    out, sums, expert, first_b, first_a,
    TILE: tl.constexpr, WIDE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    # By TMA, which leaves out what is outside: addresses would take the registers of the sums.
    left, right = _halves(sums, TILE, WIDE)
    half: tl.constexpr = WIDE // 2
    if PARTS == 2:
        place = [expert, first_b, first_a]
        out.store(place, left.to(out.dtype).reshape(1, TILE, half))
        place = [expert, first_b, first_a + half]
        out.store(place, right.to(out.dtype).reshape(1, TILE, half))
    else:
        _write(out, left, expert, first_b, first_a, TILE, half, PARTS // 2)
        _write(out, right, expert, first_b, first_a + half, TILE, half, PARTS // 2)


@triton.jit
def _columns_sum(
    left, right, left_scale, right_scale, expert, start, end, first_b, first_a,
    TILE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    sums = tl.zeros((TILE, WIDE), tl.float32)
    for step in range(start, end):  # an expert's columns are whole tiles
        x = left.load([first_b, step * TILE])
        y = right.load([first_a, step * TILE])
        sums = tl.dot(x, y.T, sums)
    return sums * tl.load(left_scale + expert) * tl.load(right_scale + expert)


@jit
def _add_columns_kernel(
    left, right, left_scale, right_scale, tile_ends, total, B, A,
    TILE: tl.constexpr, WIDE: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(1)
    start, end = span(tile_ends, expert)
    if start >= end:
        return
    first_b, first_a = corner(tl.program_id(0), B, A, TILE, WIDE, BAND)
    scales = left_scale, right_scale
    sums = _columns_sum(left, right, *scales, expert, start, end, first_b, first_a, TILE, WIDE)
    _add(total, sums, expert, first_b, first_a, B, A, TILE, WIDE)


@jit
def _multiply_columns_kernel(
    left, right, left_scale, right_scale, tile_ends, out, num_experts, B, A,
    TILE: tl.constexpr, WIDE: tl.constexpr, BAND: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    each = ((B + TILE - 1) // TILE) * ((A + WIDE - 1) // WIDE)
    for tile in range(tl.program_id(0), each * num_experts, tl.num_programs(0)):
        expert = tile // each
        start, end = span(tile_ends, expert)
        first_b, first_a = corner(tile % each, B, A, TILE, WIDE, BAND)
        scales = left_scale, right_scale
        sums = _columns_sum(left, right, *scales, expert, start, end, first_b, first_a, TILE, WIDE)
        _write(out, sums, expert, first_b, first_a, TILE, WIDE, PARTS)


def multiply_columns(left: Columns8, right: Columns8, tiles: Tiles) -> Tensor:
    """Return for each expert `left` [b, P] @ `right` [a, P].T over its columns: [e, b, a] bf16.

    a is a multiple of 8.
    """
    size = tiles.ends.shape[0], left.data.shape[0], right.data.shape[0]
    out = torch.empty(size, dtype=torch.bfloat16, device=tiles.ends.device)
    if out.numel():
        wide = _wide(out, left.data.shape[1])
        _multiply_columns_kernel[_programs(out, wide)](
            *(tiled(left.data, TILE, TILE), tiled(right.data, wide, TILE)),
            *(left.scale, right.scale, tiles.ends),
            *(tiled_each(out, TILE, wide // PARTS[wide]), *out.shape),
            PARTS=PARTS[wide],
            num_stages=4 if wide == WIDE else 3,
            **_sizes(wide),
        )
    return out


def add_wgrad8(total: Tensor, left: Columns8, right: Columns8, tiles: Tiles) -> None:
    """Add each expert's `left` [b, P] @ `right` [a, P].T to its part of `total` [e, b, a] fp32."""
    if total.numel():
        wide = _wide(total, left.data.shape[1])
        _add_columns_kernel[_grid(total, wide)](
            *(tiled(left.data, TILE, TILE), tiled(right.data, wide, TILE)),
            *(left.scale, right.scale, tiles.ends, total, *total.shape[1:]),
            num_stages=4 if wide == WIDE else 3,
            **_sizes(wide),
        )


@jit
def _add_rows_kernel(
    left, right, ends, total, B, A,
    TILE: tl.constexpr, WIDE: tl.constexpr, BAND: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(1)
    start, end = span(ends, expert)
    if start >= end:
        return
    first_b, first_a = corner(tl.program_id(0), B, A, TILE, WIDE, BAND)
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
    _add(total, sums, expert, first_b, first_a, B, A, TILE, WIDE)


def add_wgrad(total: Tensor, left: Tensor, right: Tensor, ends: Tensor) -> None:
    """Add, for each expert's rows, `left` [R, b].T @ `right` [R, a] to `total` [e, b, a] fp32.

    `left` and `right` are bf16; b and a are multiples of 8. `ends` [e] int32 is the row after each
    expert's last.
    """
    if total.numel() and left.numel():
        wide = _wide(total, left.shape[0])
        _add_rows_kernel[_grid(total, wide)](
            *(tiled(left.contiguous(), DEPTH, TILE), tiled(right.contiguous(), DEPTH, wide)),
            *(ends, total, *total.shape[1:]),
            DEPTH=DEPTH,
            num_stages=3,
            **_sizes(wide),
        )


def _wide(out: Tensor, num_rows: int) -> int:
    """Return the columns of a tile of `out` [e, b, a], which is of `num_rows` rows."""
    return WIDE if num_rows >= MANY_ROWS * out.shape[0] else NARROW


def _sizes(wide: int) -> dict[str, int]:
    return {"TILE": TILE, "WIDE": wide, "BAND": BAND, "num_warps": wide // 32}


def _programs(out: Tensor, wide: int) -> tuple[int]:
    """Return how many programs share the tiles of all experts."""
    tiles, num_experts = _grid(out, wide)
    if num_experts < MANY_EXPERTS:
        return (tiles * num_experts,)
    return (num_programs(out.device, tiles * num_experts, 1 if wide == WIDE else 2),)


def _grid(out: Tensor, wide: int) -> tuple[int, int]:
    num_experts, b, a = out.shape
    return cdiv(b, TILE) * cdiv(a, wide), num_experts
