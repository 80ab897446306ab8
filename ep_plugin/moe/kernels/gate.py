"""Router logits with fp32 accuracy through tensor cores, for bf16 tokens on CUDA.

A product of two bf16 numbers is exact in fp32, and an fp32 number is the sum of three bf16 numbers.
So each fp32 operand is given as three bf16 parts. Tensor cores truncate the sums they accumulate.
In the forward the order of the logits decides which experts are chosen, so there the products of
the largest part leave the tensor cores after every 64 terms and are added in fp32.
"""

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ep_plugin.moe.kernels._launch import cdiv, jit, next_power_of_2


@jit
def _product_kernel(
    left, right, out, one, ROWS, COLUMNS, DEPTH,
    PARTS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    depth = tl.arange(0, BLOCK_D)
    # `one` is 1.0. The compiler does not know that, so it cannot add inside the tensor core.
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    rest = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)  # small, so truncation is negligible
    for start in range(0, DEPTH, BLOCK_D):
        at = start + depth
        a = tl.load(
            left + row.to(tl.int64)[:, None] * DEPTH + at[None, :],
            mask=(row < ROWS)[:, None] & (at < DEPTH)[None, :],
            other=0.0,
        )
        there = (column < COLUMNS)[None, :] & (at < DEPTH)[:, None]
        source = right + column.to(tl.int64)[None, :] * DEPTH + at[:, None]
        total += tl.dot(a, tl.load(source, mask=there, other=0.0)) * one
        for part in tl.static_range(1, PARTS):
            smaller = tl.load(source + part * COLUMNS * DEPTH, mask=there, other=0.0)
            rest = tl.dot(a, smaller, rest)
    target = out + row.to(tl.int64)[:, None] * COLUMNS + column[None, :]
    tl.store(target, total + rest, mask=(row < ROWS)[:, None] & (column < COLUMNS)[None, :])


def product(left: Tensor, right: Tensor, parts: int) -> Tensor:
    """Return `left` [R, D] @ (sum of the `parts` blocks of `right`).T: [R, C] fp32.

    `right` is [parts * C, D], made by `split`: its first block holds the largest part. Both
    operands are bf16.
    """
    (num_rows, depth), num_columns = left.shape, right.shape[0] // parts
    out = torch.empty(num_rows, num_columns, dtype=torch.float32, device=left.device)
    if out.numel():
        # Measured on H100 with 8 to 256 experts. Up to 128 experts, reading the tokens takes most
        # of the time. Twice as many programs, with more tiles in flight, read them faster.
        if num_columns > 128:
            height, width, stages = 128, 128, 4 if parts == 1 else 3
        else:
            height, width = 64, max(16, min(64, next_power_of_2(num_columns)))
            stages = 6 if parts * num_columns <= 192 else 3
        _product_kernel[cdiv(num_rows, height), cdiv(num_columns, width)](
            *(left.contiguous(), right.contiguous(), out, 1.0, num_rows, num_columns, depth),
            PARTS=parts,
            BLOCK_R=height,
            BLOCK_C=width,
            BLOCK_D=64,
            num_warps=height // 16,
            num_stages=stages,
        )
    return out


@jit
def _split_kernel(matrix, parts, SIZE, COLUMNS, ROW_STRIDE, PART_STRIDE, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    rest = tl.load(matrix + at, mask=at < SIZE, other=0.0)
    target = parts + at // COLUMNS * ROW_STRIDE + at % COLUMNS
    for part in tl.static_range(3):
        value = rest.to(tl.bfloat16)
        tl.store(target + part * PART_STRIDE, value, mask=at < SIZE)
        rest -= value.to(tl.float32)


def split(matrix: Tensor, dim: int) -> Tensor:
    """Return the three bf16 parts of an fp32 `matrix` [R, C], concatenated along `dim` (0 or 1).

    Their sum is the matrix; the largest part is first. A bf16 matrix is returned as it is.
    """
    if matrix.dtype == torch.bfloat16:
        return matrix
    rows, columns = matrix.shape
    shape = (3 * rows, columns) if dim == 0 else (rows, 3 * columns)
    parts = torch.empty(shape, dtype=torch.bfloat16, device=matrix.device)
    strides = (columns, rows * columns) if dim == 0 else (3 * columns, columns)
    if matrix.numel():
        _split_kernel[(cdiv(matrix.numel(), 1024),)](
            matrix.contiguous(), parts, matrix.numel(), columns, *strides, BLOCK=1024
        )
    return parts


def split_torch(matrix: Tensor, dim: int) -> Tensor:
    """Return the three bf16 parts of an fp32 `matrix` [R, C]: `split` in plain torch."""
    first = matrix.bfloat16()
    rest = matrix - first.float()
    second = rest.bfloat16()
    third = (rest - second.float()).bfloat16()
    return torch.cat([first, second, third], dim=dim)


@jit
def _add_product_kernel(
    left, right, rows, out, ROWS, COLUMNS, DEPTH, HEIGHT, STRIDE,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # Programs go along a row first: `left` is read once, `right` stays in the cache.
    row = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    depth = tl.arange(0, BLOCK_D)
    cell = row.to(tl.int64)[:, None] * COLUMNS + column[None, :]
    inside = (row < ROWS)[:, None] & (column < COLUMNS)[None, :]
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for start in range(0, DEPTH, BLOCK_D):
        at = start + depth
        a = tl.load(
            left + row.to(tl.int64)[:, None] * STRIDE + at[None, :],
            mask=(row < ROWS)[:, None] & (at < DEPTH)[None, :],
            other=0.0,
        )
        of = tl.where(at < HEIGHT, at, at - HEIGHT)
        b = tl.load(
            right + of[:, None] * COLUMNS + column[None, :],
            mask=(at < DEPTH)[:, None] & (column < COLUMNS)[None, :],
            other=0.0,
        )
        total = tl.dot(a, b, total)
    total += tl.load(rows + cell, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + cell, total.to(out.dtype.element_ty), mask=inside)


def add_product(rows: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return `rows` [R, C] + `left` [R, D] @ `right` [D, C] in the dtype of `rows`, rounded once.

    `left` has stride 1 along D. A `right` of [D / 2, C] is used for both halves of D. `rows` is not
    written: it is a gradient from autograd, which others may read as well.
    """
    (num_rows, num_columns), depth = rows.shape, left.shape[1]
    out = torch.empty_like(rows)
    if out.numel():
        # These tiles are the best, or nearly, of those measured on H100 for 8 to 256 experts.
        # Loading `rows` first would be 3 to 6 % faster up to 32 experts, 6 to 11 % slower from 128.
        _add_product_kernel[cdiv(num_columns, 128), cdiv(num_rows, 64)](
            *(left, right.contiguous(), rows, out),
            *(num_rows, num_columns, depth, right.shape[0], left.stride(0)),
            BLOCK_R=64,
            BLOCK_C=128,
            BLOCK_D=max(16, min(64, next_power_of_2(depth))),
            num_warps=4,
            num_stages=2,
        )
    return out


def add_product_torch(rows: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return what `add_product` returns, in plain torch."""
    right = right.float().repeat(left.shape[1] // len(right), 1)
    return (rows.float() + left.float() @ right).to(rows.dtype)


@jit
def _join_kernel(parts, out, SIZE, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < SIZE
    total = tl.load(parts + SIZE + at, mask=inside, other=0.0)
    total += tl.load(parts + 2 * SIZE + at, mask=inside, other=0.0)
    total += tl.load(parts + at, mask=inside, other=0.0)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


def join(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sum of the three blocks of `parts` [3R, C] fp32, in `dtype`: [R, C].

    The smallest are added first: the second and the third block, then the first.
    """
    out = parts.new_empty(parts.shape[0] // 3, parts.shape[1], dtype=dtype)
    if out.numel():
        _join_kernel[(cdiv(out.numel(), 1024),)](parts, out, out.numel(), BLOCK=1024)
    return out


def join_torch(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what `join` returns, in plain torch."""
    large, middle, small = parts.chunk(3)
    return (middle + small).add_(large).to(dtype)


class GateLogits(torch.autograd.Function):
    """hidden [T, H] bf16, weight [E, H] bf16 or fp32 -> logits [T, E] fp32, hidden as given.

    The gradient that reaches the second output is added in the kernel that computes the gradient
    of `hidden` from that of the logits.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight)
        parts = split(weight, 0)
        return product(hidden, parts, parts.shape[0] // weight.shape[0]), hidden

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        hidden, weight = ctx.saved_tensors
        d_logits, d_hidden = grads
        if d_logits is None:
            return d_hidden, None
        parts, experts = split(d_logits, 1), weight.shape[0]  # [T, 3E]
        # The gradient of tokens is rounded to bf16, so 16 bits of each operand are enough for it.
        if weight.dtype == torch.bfloat16:
            left, right = parts[:, : 2 * experts], weight
        else:
            first, second, _ = parts.chunk(3, dim=1)
            high = weight.bfloat16()
            low = (weight - high).bfloat16()
            left, right = torch.cat([first, second, first], 1), torch.cat([high, high, low])
        if d_hidden is None:
            d_hidden = left @ right.repeat(left.shape[1] // len(right), 1)  # [T, H]
        else:
            d_hidden = add_product(d_hidden.contiguous(), left, right)
        d_parts = torch.mm(parts.T, hidden, out_dtype=torch.float32)  # [3E, H]
        return d_hidden, join(d_parts, weight.dtype)


def fits(hidden: Tensor, weight: Tensor) -> bool:
    """Whether `GateLogits` takes these operands: `hidden` [T, H], `weight` [E, H]."""
    dtypes = (torch.bfloat16, torch.float32)
    return hidden.is_cuda and hidden.dtype == torch.bfloat16 and weight.dtype in dtypes


def gate_logits(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits `hidden` [T, H] @ `weight` [E, H].T, [T, E] fp32, and `hidden` itself.

    A caller that goes on with the returned `hidden` saves a separate addition of its two gradients.
    See `fits` for the operands.
    """
    result: tuple[Tensor, Tensor] = GateLogits.apply(hidden, weight)
    return result
