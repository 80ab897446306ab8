"""Grouped products in e4m3 with block scales: one scale for every 128 terms of a sum.

The tensor cores sum 128 products of e4m3 values. That partial sum is scaled and added in fp32
outside of them, as in DeepSeek-V3 (arXiv:2412.19437, section 3.3.2). The tensor cores would idle
during the addition, so two programs share a multiprocessor and take turns. Each has half of the
registers. Therefore a 128 x 128 tile is multiplied in two halves, `near` and `far`.

Operands are padded with zeros to multiples of 128. Results are not: what only padding gives is not
written, except where the result is an operand again.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ep_plugin.moe.e4m3 import BLOCK, Blocks8, ColumnBlocks8, WeightBlocks8
from ep_plugin.moe.kernels._launch import jit
from ep_plugin.moe.kernels.tiles import in_bands, num_programs, span, tiled
from ep_plugin.moe.kernels.types import TILE, Tiles
from ep_plugin.moe.kernels.wgrad import corner, store_tile

PART = BLOCK // 2  # columns of half a tile
BAND = 8  # rows of tiles in a band, see `tiles.in_bands`
TWO_PROGRAMS = {"num_warps": 8, "num_stages": 3, "maxnreg": 128}  # on a multiprocessor


@triton.jit
def _more(sums, x, y, scale):
    """Return `sums` [128, PART] + x [128, 128] @ y [PART, 128].T * `scale`."""
    return sums + tl.dot(x, y.T) * scale


@jit
def _multiply_blocks_kernel(
    rows, weight, row_scale, weight_scale, ends, expert_of, row_of, tile_ends, out,
    num_experts, IN, OUT, WIDTH,
    TILE: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    down, across, steps = tl.load(tile_ends + num_experts - 1), OUT // BLOCK, IN // BLOCK
    for tile in range(tl.program_id(0), down * across, tl.num_programs(0)):
        tile_row, tile_column = in_bands(tile, down, across, BAND)
        expert = tl.load(expert_of + tile_row)
        first = tl.load(row_of + tile_row)
        row = first + tl.arange(0, TILE)
        mine = row < tl.load(ends + expert)
        of_rows = row_scale + row.to(tl.int64) * steps
        of_weight = weight_scale + (expert * across + tile_column) * steps
        start = expert * OUT + tile_column * BLOCK
        near = tl.zeros((TILE, PART), tl.float32)
        far = tl.zeros((TILE, PART), tl.float32)
        for step in range(0, steps):
            own = tl.load(of_rows + step, mask=mine, other=0.0)
            scale = (own * tl.load(of_weight + step))[:, None]
            x = rows.load([first, step * BLOCK])
            y = weight.load([start, step * BLOCK])
            z = weight.load([start + PART, step * BLOCK])
            near = _more(near, x, y, scale)
            far = _more(far, x, z, scale)
        column = tile_column * BLOCK + tl.arange(0, PART)
        target = out + row.to(tl.int64)[:, None] * WIDTH + column[None, :]
        owned = mine[:, None] & (column < WIDTH)[None, :]
        tl.store(target, near.to(out.dtype.element_ty), mask=owned)
        owned = mine[:, None] & (column + PART < WIDTH)[None, :]
        tl.store(target + PART, far.to(out.dtype.element_ty), mask=owned)


def multiply_blocks(rows: Blocks8, weight: WeightBlocks8, ends: Tensor, tiles: Tiles) -> Tensor:
    """Return each row of `rows` [R, a] times its expert's `weight` [e, b, a].T: [R, width] bf16.

    `width` is that of `weight`, b or less. `ends` [e] int32 is the row after each expert's last.
    Rows past the last expert's are not written.
    """
    (num_experts, out_features, in_features), num_rows = weight.data.shape, rows.data.shape[0]
    out = torch.empty(num_rows, weight.width, dtype=torch.bfloat16, device=ends.device)
    if out.numel():
        num_tiles = tiles.expert.shape[0] * (out_features // BLOCK)
        _multiply_blocks_kernel[(num_programs(ends.device, num_tiles, each=2),)](
            *(tiled(rows.data, TILE, BLOCK), tiled(weight.data, PART, BLOCK)),
            *(rows.scale, weight.scale, ends, tiles.expert, tiles.row, tiles.ends, out),
            *(num_experts, in_features, out_features, weight.width),
            TILE=TILE,
            PART=PART,
            BLOCK=BLOCK,
            BAND=BAND,
            **TWO_PROGRAMS,
        )
    return out


@jit
def _wgrad_blocks_kernel(
    left, right, left_scale, right_scale, tile_ends, out, B, A, OWN_B, OWN_A,
    PARTS: tl.constexpr, ADD: tl.constexpr, TILE: tl.constexpr, PART: tl.constexpr,
    BLOCK: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(1)
    start, end = span(tile_ends, expert)
    if ADD:  # noqa: SIM102
        if start >= end:
            return
    first_b, first_a = corner(tl.program_id(0), B, A, BLOCK, BLOCK, BAND)
    of_left = left_scale + first_b // BLOCK
    of_right = right_scale + first_a // BLOCK
    near = tl.zeros((BLOCK, PART), tl.float32)
    far = tl.zeros((BLOCK, PART), tl.float32)
    for step in range(start, end):
        scale = tl.load(of_left + step * (B // BLOCK)) * tl.load(of_right + step * (A // BLOCK))
        x = left.load([first_b, step * TILE])
        y = right.load([first_a, step * TILE])
        z = right.load([first_a + PART, step * TILE])
        near = _more(near, x, y, scale)
        far = _more(far, x, z, scale)
    part = first_b // (B // PARTS)
    own_b, end_b = first_b - part * (B - OWN_B) // PARTS, (part + 1) * OWN_B // PARTS
    store_tile(out, near, expert, own_b, first_a, end_b, OWN_B, OWN_A, ADD, BLOCK, PART)
    store_tile(out, far, expert, own_b, first_a + PART, end_b, OWN_B, OWN_A, ADD, BLOCK, PART)


def multiply_column_blocks(
    left: ColumnBlocks8, right: ColumnBlocks8, tiles: Tiles, size: tuple[int, int], parts: int = 1
) -> Tensor:
    """Return for each expert `left` [b, P] @ `right` [a, P].T over its columns: [e, *size] bf16.

    `size` is b and a without padding; b is padded in each of `parts` equal parts.
    """
    whole = tiles.ends.shape[0], *size
    out = torch.empty(whole, dtype=torch.bfloat16, device=tiles.ends.device)
    _columns(out, left, right, tiles, parts, add=False)
    return out


def add_wgrad_blocks(
    total: Tensor, left: ColumnBlocks8, right: ColumnBlocks8, tiles: Tiles, parts: int = 1
) -> None:
    """Add what `multiply_column_blocks` returns to `total` [e, b, a] fp32, which has no padding."""
    _columns(total, left, right, tiles, parts, add=True)


def _columns(
    out: Tensor, left: ColumnBlocks8, right: ColumnBlocks8, tiles: Tiles, parts: int, add: bool
) -> None:
    if out.numel():
        num_experts, b, a = out.shape[0], left.data.shape[0], right.data.shape[0]
        _wgrad_blocks_kernel[(b // BLOCK * (a // BLOCK), num_experts)](
            *(tiled(left.data, BLOCK, TILE), tiled(right.data, PART, TILE)),
            *(left.scale, right.scale, tiles.ends, out, b, a, *out.shape[1:]),
            PARTS=parts,
            ADD=add,
            TILE=TILE,
            PART=PART,
            BLOCK=BLOCK,
            BAND=BAND,
            **TWO_PROGRAMS,
        )
