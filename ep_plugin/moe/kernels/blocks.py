"""From bf16 to e4m3 with block scales; a block is 128 features of a row, or 128 x 128 of a weight.

Weights are written in both layouts, as they are and transposed. Each value is read once. Sizes are
padded with zeros to multiples of 128. The twins in plain torch are in `blocks_torch`.
"""

import torch
import triton.language as tl
from torch import Tensor

from ep_plugin.moe.e4m3 import BLOCK, E4M3, Blocks8, WeightBlocks8, whole_blocks
from ep_plugin.moe.kernels._launch import jit, next_power_of_2
from ep_plugin.moe.kernels.quantize import power_of_two_scale, warps


@jit
def _quantize_blocks_kernel(
    matrix, data, scales, WIDTH, WHOLE, BLOCKS: tl.constexpr, SIZE: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCKS)
    column = block[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    values = tl.load(matrix + row * WIDTH + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    scale = power_of_two_scale(tl.max(tl.abs(values), axis=1))
    small = (values * (1.0 / scale)[:, None]).to(tl.float8e4nv)
    tl.store(data + row * WHOLE + column, small, mask=column < WHOLE)
    tl.store(scales + row * (WHOLE // SIZE) + block, scale, mask=block < WHOLE // SIZE)


def quantize_blocks(matrix: Tensor) -> Blocks8:
    """Return `matrix` [R, X] in e4m3, with one scale for each 128 columns of a row."""
    num_rows, width = matrix.shape
    whole = whole_blocks(width)
    data = matrix.new_empty(num_rows, whole, dtype=E4M3)
    scale = torch.empty(num_rows, whole // BLOCK, dtype=torch.float32, device=matrix.device)
    if matrix.numel():
        blocks = next_power_of_2(whole // BLOCK)
        _quantize_blocks_kernel[(num_rows,)](
            *(matrix.contiguous(), data, scale, width, whole),
            BLOCKS=blocks,
            SIZE=BLOCK,
            num_warps=warps(blocks * BLOCK),
        )
    return Blocks8(data, scale)


@jit
def _quantize_weight_kernel(
    weight, data, scales, turned, turned_scales, ROWS, WIDTH, OWN_ROWS, OWN_WIDTH,
    PARTS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Write [ROWS, WIDTH] of [OWN_ROWS, OWN_WIDTH]; rows are padded in each of PARTS parts."""
    down, across = ROWS // SIZE, WIDTH // SIZE
    expert = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    column = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    part = tl.program_id(0) * SIZE // (ROWS // PARTS)
    own_row = row - part * (ROWS - OWN_ROWS) // PARTS
    there = (own_row < (part + 1) * OWN_ROWS // PARTS)[:, None] & (column < OWN_WIDTH)[None, :]
    own = (expert * OWN_ROWS + own_row)[:, None] * OWN_WIDTH + column[None, :]
    values = tl.load(weight + own, mask=there, other=0.0).to(tl.float32)
    scale = power_of_two_scale(tl.max(tl.abs(values)))
    cell = expert * ROWS * WIDTH + row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    tl.store(data + cell, (values * (1.0 / scale)).to(tl.float8e4nv))
    # Read back from the cache: Triton 3.6 gives wrong values when it transposes the rounded tile.
    tl.debug_barrier()
    small = tl.trans(tl.load(data + cell))
    cell = expert * ROWS * WIDTH + column.to(tl.int64)[:, None] * ROWS + row[None, :]
    tl.store(turned + cell, small)
    first = expert * down * across
    tl.store(scales + first + tl.program_id(0) * across + tl.program_id(1), scale)
    tl.store(turned_scales + first + tl.program_id(1) * down + tl.program_id(0), scale)


def quantize_weight_blocks(weight: Tensor, parts: int = 1) -> tuple[WeightBlocks8, WeightBlocks8]:
    """Return `weight` [e, b, a] and its transpose [e, a, b] in e4m3, one scale per 128 x 128.

    b and a are padded with zeros to multiples of 128; b in each of `parts` equal parts, as gate and
    up of a gated activation.
    """
    num_experts, own_rows, own_width = weight.shape
    rows, width = parts * whole_blocks(own_rows // parts), whole_blocks(own_width)
    down, across = rows // BLOCK, width // BLOCK
    empty = weight.new_empty
    straight = WeightBlocks8(
        empty(num_experts, rows, width, dtype=E4M3),
        empty(num_experts, down, across, dtype=torch.float32),
        rows,
    )
    turned = WeightBlocks8(
        empty(num_experts, width, rows, dtype=E4M3),
        empty(num_experts, across, down, dtype=torch.float32),
        width,
    )
    if weight.numel():
        _quantize_weight_kernel[(down, across, num_experts)](
            *(weight.contiguous(), straight.data, straight.scale, turned.data, turned.scale),
            *(rows, width, own_rows, own_width),
            PARTS=parts,
            SIZE=BLOCK,
            num_warps=8,
        )
    return straight, turned
