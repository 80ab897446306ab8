"""From bf16 to e4m3 with one power-of-two scale per row; transposes; weights in both layouts.

One program reads a whole row, so it finds the row's largest value without a second pass. A
transpose rescales e4m3 values to a larger scale: it multiplies them by powers of two of at most 1,
in fp16. That is exact for every product that e4m3 does not round to zero, and conversion costs half
as much as through fp32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ep_plugin.moe.e4m3 import BLOCK, E4M3, Blocks8, ColumnBlocks8, Columns8, Rows8, Weight8
from ep_plugin.moe.kernels._launch import cdiv, jit, next_power_of_2
from ep_plugin.moe.kernels.tiles import span
from ep_plugin.moe.kernels.types import TILE, Tiles


def warps(width: int) -> int:
    """Return the number of warps of a program that holds `width` values."""
    return 4 if width <= 4096 else 8 if width <= 8192 else 16


@triton.jit
def power_of_two_scale(largest):
    """Return the smallest power of two s >= 2^-126 with largest / s <= 448.

    It is read from the bits of largest / 448. 1 / s is exact, and multiplying by it takes a third
    of the time of a division.
    """
    bits = (largest * (1.0 / 448.0)).to(tl.int32, bitcast=True)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(tl.int32)
    exponent = tl.minimum(tl.maximum(exponent, 1), 254)
    return (exponent << 23).to(tl.float32, bitcast=True)


@jit
def _quantize_kernel(matrix, data, scales, WIDTH, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    values = tl.load(matrix + row * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    scale = power_of_two_scale(tl.max(tl.abs(values)))
    tl.store(data + row * WIDTH + column, (values * (1.0 / scale)).to(tl.float8e4nv), mask=inside)
    tl.store(scales + row, scale)


def quantize_rows(matrix: Tensor) -> Rows8:
    """Return `matrix` [R, X] in e4m3; each row has its own power-of-two scale."""
    num_rows, width = matrix.shape
    data = matrix.new_empty(matrix.shape, dtype=E4M3)
    scale = torch.empty(num_rows, dtype=torch.float32, device=matrix.device)
    if matrix.numel():
        block = next_power_of_2(width)
        _quantize_kernel[(num_rows,)](
            *(matrix.contiguous(), data, scale, width), BLOCK=block, num_warps=warps(block)
        )
    return Rows8(data, scale)


@jit
def _largest_kernel(scale, order, ends, out, choices, TOKENS: tl.constexpr, BLOCK: tl.constexpr):
    expert = tl.program_id(0)
    start, end = span(ends, expert)
    largest = tl.zeros((BLOCK,), tl.float32)
    for first in range(start, end, BLOCK):
        row = first + tl.arange(0, BLOCK)
        source = row
        if TOKENS:
            source = tl.load(order + row, mask=row < end, other=0) // choices
        largest = tl.maximum(largest, tl.load(scale + source, mask=row < end, other=0.0))
    whole = tl.max(largest)
    tl.store(out + expert, tl.where(whole > 0, whole, 1.0))


@jit
def _transpose_kernel(
    data, scale, largest, order, ends, expert_of, row_of, out, choices, WIDTH, NUM_COLUMNS,
    TOKENS: tl.constexpr, BLOCKS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Transpose TILE rows x BLOCK features; with BLOCKS each row has a scale for each BLOCK."""
    expert = tl.load(expert_of + tl.program_id(0))
    if expert < 0:
        return
    row = tl.load(row_of + tl.program_id(0)) + tl.arange(0, TILE)
    present = row < tl.load(ends + expert)
    feature = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    source = row
    if TOKENS:
        source = tl.load(order + row, mask=present, other=0) // choices
    if BLOCKS:
        num_blocks = WIDTH // BLOCK
        cell = source.to(tl.int64) * num_blocks + tl.program_id(1)
        own = tl.load(scale + cell, mask=present, other=0.0)
        most = tl.max(own)  # > 0: a tile has at least one row
        tl.store(largest + tl.program_id(0) * num_blocks + tl.program_id(1), most)
    else:
        own = tl.load(scale + source, mask=present, other=0.0)
        most = tl.load(largest + expert)
    ratio = own / most
    there = present[:, None] & (feature < WIDTH)[None, :]
    start = source.to(tl.int64)[:, None] * WIDTH
    values = tl.load(data + start + feature[None, :], mask=there, other=0.0)
    moved = (values.to(tl.float16) * ratio.to(tl.float16)[:, None]).to(tl.float8e4nv)
    column = tl.program_id(0) * TILE + tl.arange(0, TILE)
    target = out + feature[:, None].to(tl.int64) * NUM_COLUMNS + column[None, :]
    tl.store(target, tl.trans(moved), mask=(feature < WIDTH)[:, None])


def transpose_rows(
    rows: Rows8, tiles: Tiles, order: Tensor, ends: Tensor, choices: int
) -> Columns8:
    """Return `rows` [*, X] transposed to [X, P], tile after tile, with one scale per expert.

    It is the largest scale of the expert's rows. P is 128 for each tile. With `choices` 0, `rows`
    are rows of the experts; otherwise they are tokens with `choices` choices each, and `order`
    [R] int32 is the flat choice of each row.
    """
    largest = torch.empty(ends.shape[0], dtype=torch.float32, device=ends.device)
    _largest_kernel[(ends.shape[0],)](
        *(rows.scale, order, ends, largest, choices), TOKENS=choices > 0, BLOCK=4096, num_warps=16
    )
    return Columns8(_transposed(rows, largest, tiles, order, ends, choices), largest)


def transpose_blocks(
    rows: Blocks8, tiles: Tiles, order: Tensor, ends: Tensor, choices: int
) -> ColumnBlocks8:
    """Return `rows` [*, X] transposed to [X, P], tile after tile, with one scale per 128 x 128.

    It is the largest scale in that block. P is 128 for each tile. With `choices` 0, `rows` are
    rows of the experts; otherwise they are tokens with `choices` choices each, and `order` [R]
    int32 is the flat choice of each row.
    """
    size = tiles.expert.shape[0], rows.scale.shape[1]
    largest = torch.empty(size, dtype=torch.float32, device=ends.device)
    return ColumnBlocks8(_transposed(rows, largest, tiles, order, ends, choices), largest)


def _transposed(
    rows: Rows8 | Blocks8,
    largest: Tensor,
    tiles: Tiles,
    order: Tensor,
    ends: Tensor,
    choices: int,
) -> Tensor:
    """Return the columns [X, P] e4m3, for the scales `largest`; block scales are written there."""
    width, num_tiles = rows.data.shape[1], tiles.expert.shape[0]
    out = rows.data.new_empty(width, num_tiles * TILE)
    if out.numel():
        _transpose_kernel[(num_tiles, cdiv(width, BLOCK))](
            *(rows.data, rows.scale, largest, order, ends, tiles.expert, tiles.row, out, choices),
            *(width, num_tiles * TILE),
            TOKENS=choices > 0,
            BLOCKS=isinstance(rows, Blocks8),
            TILE=TILE,
            BLOCK=BLOCK,
        )
    return out


@jit
def _transpose_weight_kernel(
    data, scale, largest, out, out_scale, ROWS, WIDTH,
    BLOCK_R: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(2)
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    feature = tl.program_id(1) * BLOCK_X + tl.arange(0, BLOCK_X)
    there = (row < ROWS)[:, None] & (feature < WIDTH)[None, :]
    matrix = expert.to(tl.int64) * ROWS * WIDTH
    start = matrix + row.to(tl.int64)[:, None] * WIDTH
    values = tl.load(data + start + feature[None, :], mask=there, other=0.0).to(tl.float32)
    ratio = tl.load(scale + expert * ROWS + row, mask=row < ROWS, other=0.0)
    most = tl.load(largest + expert)
    moved = (values.to(tl.float16) * (ratio / most).to(tl.float16)[:, None]).to(tl.float8e4nv)
    target = out + matrix + feature.to(tl.int64)[:, None] * ROWS + row[None, :]
    tl.store(target, tl.trans(moved), mask=tl.trans(there))
    if tl.program_id(0) == 0:
        scales = tl.zeros((BLOCK_X,), tl.float32) + most
        tl.store(out_scale + expert * WIDTH + feature, scales, mask=feature < WIDTH)


def quantize_weight(weight: Tensor) -> tuple[Weight8, Weight8]:
    """Return `weight` [e, b, a] in e4m3, and its transpose [e, a, b].

    `weight` has one scale per row, its transpose one per expert.
    """
    num_experts, num_rows, width = weight.shape
    rows = quantize_rows(weight.reshape(-1, width))
    scale = rows.scale.view(num_experts, num_rows)
    turned = Weight8(
        rows.data.new_empty(num_experts, width, num_rows), scale.new_empty(num_experts, width)
    )
    if weight.numel():
        grid = (cdiv(num_rows, 128), cdiv(width, 128), num_experts)
        _transpose_weight_kernel[grid](
            *(rows.data, scale, scale.amax(dim=1), turned.data, turned.scale, num_rows, width),
            BLOCK_R=128,
            BLOCK_X=128,
        )
    return Weight8(rows.data.view(weight.shape), scale), turned
