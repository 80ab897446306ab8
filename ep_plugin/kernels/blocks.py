"""Rounding to e4m3 by blocks, in one pass over the matrix; the twins are in `blocks_torch`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ep_plugin.e4m3 import BLOCK, E4M3, Blocks8
from ep_plugin.kernels._launch import jit
from ep_plugin.kernels.quantize import power_of_two_scale, warps

FEATURES = 64  # of a tile of round_columns


@jit
def _rows_kernel(
    matrix, ends, out, scales, num_experts, WIDTH,
    ALL: tl.constexpr, NARROW: tl.constexpr, BLOCKS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """One row; NARROW writes e4m3 and scales, else the rounded values are written."""
    row = tl.program_id(0).to(tl.int64)
    if not ALL:  # noqa: SIM102
        if row >= tl.load(ends + num_experts - 1):
            return
    block = tl.arange(0, BLOCKS)
    column = block[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    there = column < WIDTH
    values = tl.load(matrix + row * WIDTH + column, mask=there, other=0.0).to(tl.float32)
    scale = power_of_two_scale(tl.max(tl.abs(values), axis=1))
    small = (values / scale[:, None]).to(tl.float8e4nv)
    if NARROW:
        tl.store(out + row * WIDTH + column, small, mask=there)
        tl.store(scales + row * (WIDTH // SIZE) + block, scale, mask=block < WIDTH // SIZE)
    else:
        rounded = small.to(tl.float32) * scale[:, None]
        tl.store(out + row * WIDTH + column, rounded.to(tl.bfloat16), mask=there)


def quantize_blocks(matrix: Tensor) -> Blocks8:
    """Return `matrix` [R, X] in e4m3, each 128 columns of a row with their own scale."""
    num_rows, width = matrix.shape
    data = torch.empty_like(matrix, dtype=E4M3)
    scale = torch.empty(num_rows, width // BLOCK, dtype=torch.float32, device=matrix.device)
    if matrix.numel():
        blocks = triton.next_power_of_2(width // BLOCK)
        _rows_kernel[(num_rows,)](
            *(matrix.contiguous(), scale, data, scale, 1, width),
            ALL=True,
            NARROW=True,
            BLOCKS=blocks,
            SIZE=BLOCK,
            num_warps=warps(blocks * BLOCK),
        )
    return Blocks8(data, scale)


def round_rows(rows: Tensor, ends: Tensor) -> Tensor:
    """Return `rows` [R, X] rounded to e4m3 by 128 columns: bf16, rows behind the last left out."""
    num_rows, width = rows.shape
    out = torch.empty_like(rows, dtype=torch.bfloat16)
    if rows.numel():
        blocks = triton.next_power_of_2(width // BLOCK)
        _rows_kernel[(num_rows,)](
            *(rows, ends, out, ends, len(ends), width),
            ALL=False,
            NARROW=False,
            BLOCKS=blocks,
            SIZE=BLOCK,
            num_warps=warps(blocks * BLOCK),
        )
    return out


@jit
def _widen_kernel(data, scales, out, COUNT, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    cell = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = cell < COUNT
    scale = tl.load(scales + cell // SIZE, mask=there, other=0.0)
    values = tl.load(data + cell, mask=there, other=0.0).to(tl.float32) * scale
    tl.store(out + cell, values.to(tl.bfloat16), mask=there)


def dequantize_blocks(blocks: Blocks8) -> Tensor:
    """Return [R, X] bf16; nothing is rounded."""
    out = torch.empty_like(blocks.data, dtype=torch.bfloat16)
    count = out.numel()
    if count:
        _widen_kernel[(triton.cdiv(count, 2048),)](
            *(blocks.data, blocks.scale, out, count), SIZE=BLOCK, BLOCK=2048
        )
    return out


@jit
def _columns_kernel(
    rows, ends, out, num_experts, WIDTH, SIZE: tl.constexpr, FEATURES: tl.constexpr
):
    """One block of an expert's rows, some features; blocks are counted over all experts."""
    before = 0  # blocks of the experts before
    start = 0
    first = -1
    last = 0
    for expert in range(num_experts):
        end = tl.load(ends + expert)
        block = tl.program_id(0) - before
        blocks = (end - start + SIZE - 1) // SIZE
        if (block >= 0) & (block < blocks):
            first = start + block * SIZE
            last = end
        before += blocks
        start = end
    if first < 0:
        return
    row = first + tl.arange(0, SIZE)
    feature = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    there = (row < last)[:, None] & (feature < WIDTH)[None, :]
    cell = row.to(tl.int64)[:, None] * WIDTH + feature[None, :]
    values = tl.load(rows + cell, mask=there, other=0.0).to(tl.float32)
    scale = power_of_two_scale(tl.max(tl.abs(values), axis=0))[None, :]
    rounded = (values / scale).to(tl.float8e4nv).to(tl.float32) * scale
    tl.store(out + cell, rounded.to(tl.bfloat16), mask=there)


def round_columns(rows: Tensor, ends: Tensor) -> Tensor:
    """Return `rows` [R, X] rounded to e4m3 by 128 rows of an expert: bf16.

    Each expert's blocks begin at its first row, and its last block may be shorter.
    """
    num_rows, width = rows.shape
    out = torch.empty_like(rows, dtype=torch.bfloat16)
    if rows.numel():
        blocks = num_rows // BLOCK + len(ends)
        _columns_kernel[(blocks, triton.cdiv(width, FEATURES))](
            *(rows, ends, out, len(ends), width), SIZE=BLOCK, FEATURES=FEATURES
        )
    return out


@jit
def _weight_kernel(weight, out, ROWS, WIDTH, SIZE: tl.constexpr):
    row = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    column = tl.program_id(2) * SIZE + tl.arange(0, SIZE)
    there = (row < ROWS)[:, None] & (column < WIDTH)[None, :]
    cell = (tl.program_id(0).to(tl.int64) * ROWS + row)[:, None] * WIDTH + column[None, :]
    values = tl.load(weight + cell, mask=there, other=0.0).to(tl.float32)
    scale = power_of_two_scale(tl.max(tl.abs(values)))
    rounded = (values / scale).to(tl.float8e4nv).to(tl.float32) * scale
    tl.store(out + cell, rounded.to(tl.bfloat16), mask=there)


def round_weight(weight: Tensor) -> Tensor:
    """Return `weight` [e, b, a] rounded to e4m3 by 128 x 128 values: bf16."""
    out = torch.empty_like(weight, dtype=torch.bfloat16)
    num_experts, num_rows, width = weight.shape
    if weight.numel():
        grid = (num_experts, triton.cdiv(num_rows, BLOCK), triton.cdiv(width, BLOCK))
        _weight_kernel[grid](*(weight.contiguous(), out, num_rows, width), SIZE=BLOCK, num_warps=8)
    return out
