"""Router logits with fp32 accuracy through tensor cores, for bf16 tokens on CUDA.

A product of two bf16 numbers is exact in fp32, and an fp32 number is the sum of three bf16 numbers.
So each fp32 operand goes in as three bf16 parts. Tensor cores cut the sums they keep: the forward,
where logits decide, adds every 64 products outside of them, in fp32.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _product_kernel(
    left, right, out, one, ROWS, COLUMNS, DEPTH,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    depth = tl.arange(0, BLOCK_D)
    unit = tl.load(one)  # 1, but the compiler does not know, so it cannot add in the tensor core
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for start in range(0, DEPTH, BLOCK_D):
        at = start + depth
        a = tl.load(
            left + row.to(tl.int64)[:, None] * DEPTH + at[None, :],
            mask=(row < ROWS)[:, None] & (at < DEPTH)[None, :],
            other=0.0,
        )
        b = tl.load(
            right + column.to(tl.int64)[None, :] * DEPTH + at[:, None],
            mask=(column < COLUMNS)[None, :] & (at < DEPTH)[:, None],
            other=0.0,
        )
        total += tl.dot(a, b) * unit
    target = out + row.to(tl.int64)[:, None] * COLUMNS + column[None, :]
    tl.store(target, total, mask=(row < ROWS)[:, None] & (column < COLUMNS)[None, :])


def product(left: Tensor, right: Tensor) -> Tensor:
    """Return `left` [R, D] times `right` [C, D] transposed, both bf16: [R, C] fp32."""
    (num_rows, depth), num_columns = left.shape, len(right)
    out = torch.empty(num_rows, num_columns, dtype=torch.float32, device=left.device)
    if out.numel():
        one = torch.ones(1, dtype=torch.float32, device=left.device)
        grid = (triton.cdiv(num_rows, 128), triton.cdiv(num_columns, 128))
        _product_kernel[grid](
            *(left.contiguous(), right.contiguous(), out, one, num_rows, num_columns, depth),
            BLOCK_R=128,
            BLOCK_C=128,
            BLOCK_D=64,
            num_warps=8,
            num_stages=4,
        )
    return out


def split(matrix: Tensor, dim: int) -> Tensor:
    """Return the three bf16 parts of an fp32 `matrix`, side by side along `dim`, largest first.

    A bf16 matrix is its own only part.
    """
    if matrix.dtype == torch.bfloat16:
        return matrix
    first = matrix.bfloat16()
    rest = matrix - first.float()
    second = rest.bfloat16()
    third = (rest - second.float()).bfloat16()
    return torch.cat([first, second, third], dim=dim)


def _fold(summands: Tensor, parts: int, dim: int) -> Tensor:
    """Return the sum of the `parts` blocks of `summands` along `dim`."""
    if parts == 1:
        return summands
    blocks = summands.chunk(parts, dim=dim)
    return blocks[0] + (blocks[1] + blocks[2])


class GateLogits(torch.autograd.Function):
    """hidden [T, H] bf16, weight [E, H] bf16 or fp32 -> logits [T, E] fp32."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        parts = split(weight, 0)
        return _fold(product(hidden, parts), len(parts) // len(weight), 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        hidden, weight = ctx.saved_tensors
        parts = split(grads[0], 1)  # [T, 3E]
        first, second, _ = parts.chunk(3, dim=1)
        high = weight.bfloat16()
        low = (weight - high).bfloat16()
        # The gradient of tokens is rounded to bf16, so 16 bits of each operand are enough for it.
        d_hidden = torch.cat([first, second, first], 1) @ torch.cat([high, high, low])  # [T, H]
        d_parts = torch.mm(parts.T, hidden, out_dtype=torch.float32)  # [3E, H]
        return d_hidden, _fold(d_parts, 3, 0).to(weight.dtype)


def fits(hidden: Tensor, weight: Tensor) -> bool:
    """Whether `GateLogits` takes these operands."""
    dtypes = (torch.bfloat16, torch.float32)
    return hidden.is_cuda and hidden.dtype == torch.bfloat16 and weight.dtype in dtypes


def gate_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """Return `hidden` [T, H] times `weight` [E, H] transposed, [T, E] fp32; see `fits`."""
    result: Tensor = GateLogits.apply(hidden, weight)
    return result
