"""From bf16 to e4m3: rows with a power of two each, their transposes, weights in both layouts.

A row's largest value never leaves its program, so quantising costs no second pass. Transposing
multiplies e4m3 by powers of two of at most 1, in fp16: its numbers hold every product that e4m3
does not round to zero, and converting costs half of what it does through fp32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ep_plugin.e4m3 import E4M3, Columns8, Rows8, Weight8
from ep_plugin.kernels._launch import jit

TILE = 128  # columns written by one program of transpose_rows
ALIGN = 16  # columns; a product wants each expert's to start at a 16-byte address


def warps(width: int) -> int:
    """Return the warps of a program that holds `width` numbers."""
    return 4 if width <= 4096 else 8 if width <= 8192 else 16


@triton.jit
def power_of_two_scale(largest):
    """Smallest power of two s with largest / s <= 448, from the bits of the quotient."""
    bits = (largest * (1.0 / 448.0)).to(tl.int32, bitcast=True)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(tl.int32)
    exponent = tl.minimum(tl.maximum(exponent, 1), 254)
    scale = (exponent << 23).to(tl.float32, bitcast=True)
    return tl.where(largest > 0, scale, 1.0)


@jit
def _quantize_kernel(matrix, data, scales, WIDTH, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    values = tl.load(matrix + row * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    scale = power_of_two_scale(tl.max(tl.abs(values)))
    tl.store(data + row * WIDTH + column, (values / scale).to(tl.float8e4nv), mask=inside)
    tl.store(scales + row, scale)


def quantize_rows(matrix: Tensor) -> Rows8:
    """Return `matrix` [R, X] in e4m3, each row with its own power of two."""
    num_rows, width = matrix.shape
    data = torch.empty_like(matrix, dtype=E4M3)
    scale = torch.empty(num_rows, dtype=torch.float32, device=matrix.device)
    if matrix.numel():
        block = triton.next_power_of_2(width)
        _quantize_kernel[(num_rows,)](
            *(matrix.contiguous(), data, scale, width), BLOCK=block, num_warps=warps(block)
        )
    return Rows8(data, scale)


@jit
def _columns_kernel(
    ends, row_of, expert_of, padded_ends, num_experts, BLOCK: tl.constexpr, ALIGN: tl.constexpr
):
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.full((BLOCK,), -1, tl.int32)
    expert = tl.zeros((BLOCK,), tl.int32)
    start = 0
    padded_start = 0
    for index in range(num_experts):
        end = tl.load(ends + index)
        padded_end = padded_start + (end - start + ALIGN - 1) // ALIGN * ALIGN
        mine = (column >= padded_start) & (column < padded_end)
        candidate = start + column - padded_start
        row = tl.where(mine & (candidate < end), candidate, row)
        expert = tl.where(mine, index, expert)
        if tl.program_id(0) == 0:
            tl.store(padded_ends + index, padded_end)
        start = end
        padded_start = padded_end
    tl.store(row_of + column, row)
    tl.store(expert_of + column, expert)


def pad_columns(num_rows: int, ends: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the row of each column [P] or -1, its expert [P], and the padded ends [e], int32.

    Each expert's rows are padded to a multiple of ALIGN columns; P is enough for any counts.
    """
    num_experts = len(ends)
    size = triton.cdiv(num_rows + num_experts * (ALIGN - 1), TILE) * TILE
    row, expert = torch.empty(2, size, dtype=torch.int32, device=ends.device)
    padded = torch.empty_like(ends)
    if size:
        _columns_kernel[(size // TILE,)](
            *(ends, row, expert, padded, num_experts), BLOCK=TILE, ALIGN=ALIGN
        )
    return row, expert, padded


@jit
def _largest_kernel(
    scale, order, ends, out, choices, WIDTH, TOKENS: tl.constexpr, BLOCK: tl.constexpr
):
    expert = tl.program_id(0)
    end = tl.load(ends + expert)
    start = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    largest = tl.zeros((BLOCK,), tl.float32)
    for first in range(start, end, BLOCK):
        row = first + tl.arange(0, BLOCK)
        source = row
        if TOKENS:
            source = tl.load(order + row, mask=row < end, other=0) // choices
        largest = tl.maximum(largest, tl.load(scale + source, mask=row < end, other=0.0))
    whole = tl.max(largest)
    whole = tl.where(whole > 0, whole, 1.0)
    for first in range(0, WIDTH, BLOCK):
        column = first + tl.arange(0, BLOCK)
        tl.store(out + expert * WIDTH + column, whole, mask=column < WIDTH)


@jit
def _transpose_kernel(
    data, scale, largest, order, row_of, expert_of, out, choices, WIDTH, NUM_COLUMNS,
    TOKENS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    feature = tl.program_id(1) * BLOCK_X + tl.arange(0, BLOCK_X)
    row = tl.load(row_of + column)
    present = row >= 0
    source = row
    if TOKENS:
        source = tl.load(order + row, mask=present, other=0) // choices
    whole = tl.load(largest + tl.load(expert_of + column) * WIDTH)
    ratio = (tl.load(scale + source, mask=present, other=0.0) / whole).to(tl.float16)
    there = present[:, None] & (feature < WIDTH)[None, :]
    start = source.to(tl.int64)[:, None] * WIDTH
    values = tl.load(data + start + feature[None, :], mask=there, other=0.0)
    moved = (values.to(tl.float16) * ratio[:, None]).to(tl.float8e4nv)
    target = out + feature[:, None].to(tl.int64) * NUM_COLUMNS + column[None, :]
    tl.store(target, tl.trans(moved), mask=(feature < WIDTH)[:, None])


def transpose_rows(
    rows: Rows8, columns: tuple[Tensor, Tensor, Tensor], order: Tensor, ends: Tensor, choices: int
) -> Columns8:
    """Return `rows` transposed and padded as `columns` says, an expert's largest scale for all.

    `choices` 0 says that `rows` are rows; else they are tokens with so many choices each.
    """
    row_of, expert_of, _ = columns
    width, size = rows.data.shape[1], len(row_of)
    out = rows.data.new_empty(width, size)
    largest = torch.empty(len(ends), width, dtype=torch.float32, device=ends.device)
    if size and width:
        _largest_kernel[(len(ends),)](
            *(rows.scale, order, ends, largest, choices, width), TOKENS=choices > 0, BLOCK=1024
        )
        _transpose_kernel[(size // TILE, triton.cdiv(width, 128))](
            *(rows.data, rows.scale, largest, order, row_of, expert_of, out, choices, width, size),
            TOKENS=choices > 0,
            BLOCK_R=TILE,
            BLOCK_X=128,
        )
    return Columns8(out, largest)


@jit
def _transpose_weight_kernel(
    data, scale, largest, out, ROWS, WIDTH, BLOCK_R: tl.constexpr, BLOCK_X: tl.constexpr
):
    expert = tl.program_id(2)
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    feature = tl.program_id(1) * BLOCK_X + tl.arange(0, BLOCK_X)
    there = (row < ROWS)[:, None] & (feature < WIDTH)[None, :]
    matrix = expert.to(tl.int64) * ROWS * WIDTH
    start = matrix + row.to(tl.int64)[:, None] * WIDTH
    values = tl.load(data + start + feature[None, :], mask=there, other=0.0).to(tl.float32)
    ratio = tl.load(scale + expert * ROWS + row, mask=row < ROWS, other=0.0)
    ratio = (ratio / tl.load(largest + expert)).to(tl.float16)
    moved = (values.to(tl.float16) * ratio[:, None]).to(tl.float8e4nv)
    target = out + matrix + feature.to(tl.int64)[:, None] * ROWS + row[None, :]
    tl.store(target, tl.trans(moved), mask=tl.trans(there))


def quantize_weight(weight: Tensor) -> tuple[Weight8, Weight8]:
    """Return `weight` [e, b, a] in e4m3 and its transpose [e, a, b], one scale for each expert."""
    num_experts, num_rows, width = weight.shape
    rows = quantize_rows(weight.reshape(-1, width))
    scale = rows.scale.view(num_experts, num_rows)
    largest = scale.amax(dim=1)
    out = rows.data.new_empty(num_experts, width, num_rows)
    if out.numel():
        grid = (triton.cdiv(num_rows, TILE), triton.cdiv(width, 128), num_experts)
        _transpose_weight_kernel[grid](
            *(rows.data, scale, largest, out, num_rows, width), BLOCK_R=TILE, BLOCK_X=128
        )
    straight = Weight8(rows.data.view(weight.shape), scale)
    return straight, Weight8(out, largest.unsqueeze(1).repeat(1, width))
