"""Rounding to e4m3 by 128 features, in one pass over the matrix; the twins are in `blocks_torch`.

One program handles one row or token. Rows behind the last expert's are not touched.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ep_plugin.e4m3 import BLOCK, E4M3, Blocks8
from ep_plugin.kernels._launch import jit
from ep_plugin.kernels.quantize import power_of_two_scale, warps


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
            *(matrix, scale, data, scale, 1, width),
            ALL=True,
            NARROW=True,
            BLOCKS=blocks,
            SIZE=BLOCK,
            num_warps=warps(blocks * BLOCK),
        )
    return Blocks8(data, scale)


def round_rows(rows: Tensor, ends: Tensor) -> Tensor:
    """Return `rows` [R, X] rounded to e4m3 by 128 columns: bf16."""
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
def _spread_kernel(
    source, scales, place, ends, out, num_experts, WIDTH,
    CHOICES: tl.constexpr, SCALED: tl.constexpr, BLOCKS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    # Token by token: each is read and rounded once, although it goes to several rows.
    last = tl.load(ends + num_experts - 1)
    token = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCKS)
    column = block[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    there = column < WIDTH
    values = tl.load(source + token * WIDTH + column, mask=there, other=0.0).to(tl.float32)
    if SCALED:
        cell = token * (WIDTH // SIZE) + block
        scale = tl.load(scales + cell, mask=block < WIDTH // SIZE, other=0.0)
    else:
        scale = power_of_two_scale(tl.max(tl.abs(values), axis=1))
        values = (values / scale[:, None]).to(tl.float8e4nv).to(tl.float32)
    rounded = (values * scale[:, None]).to(tl.bfloat16)
    for choice in tl.static_range(CHOICES):
        row = tl.load(place + token * CHOICES + choice).to(tl.int64)
        if row < last:
            tl.store(out + row * WIDTH + column, rounded, mask=there)


def spread_blocks(
    tokens: Tensor | Blocks8, place: Tensor, ends: Tensor, num_rows: int | None = None
) -> Tensor:
    """Return the token of each row, rounded to e4m3 by 128 columns: [R, X] bf16.

    Rows of `tokens` [N, X] are at `place` [N, C]. R is `num_rows`, at least the last of `ends`, or
    N * C.
    """
    source, scale = (tokens, None) if isinstance(tokens, Tensor) else (tokens.data, tokens.scale)
    (num_tokens, choices), width = place.shape, source.shape[1]
    size = num_tokens * choices if num_rows is None else num_rows
    out = torch.empty(size, width, dtype=torch.bfloat16, device=source.device)
    if out.numel():
        blocks = triton.next_power_of_2(width // BLOCK)
        _spread_kernel[(num_tokens,)](
            *(source, ends if scale is None else scale, place, ends, out, len(ends), width),
            CHOICES=choices,
            SCALED=scale is not None,
            BLOCKS=blocks,
            SIZE=BLOCK,
            num_warps=warps(blocks * BLOCK),
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
        _weight_kernel[grid](*(weight, out, num_rows, width), SIZE=BLOCK, num_warps=8)
    return out
