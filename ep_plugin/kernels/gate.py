"""Router logits with fp32 accuracy through tensor cores, for bf16 tokens on CUDA.

A product of two bf16 numbers is exact in fp32, and an fp32 number is the sum of three bf16 numbers.
So each fp32 operand goes in as three bf16 parts, all in one product of a library, and the sums are
fp32: the accuracy of an fp32 product at the speed of a bf16 one.
"""

from typing import Any

import torch
from torch import Tensor


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


def _fold(product: Tensor, parts: int, dim: int) -> Tensor:
    """Return the sum of the `parts` blocks of `product` along `dim`."""
    if parts == 1:
        return product
    blocks = product.chunk(parts, dim=dim)
    return blocks[0] + (blocks[1] + blocks[2])


class GateLogits(torch.autograd.Function):
    """hidden [T, H] bf16, weight [E, H] bf16 or fp32 -> logits [T, E] fp32."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        parts = split(weight, 0)
        product = torch.mm(hidden, parts.T, out_dtype=torch.float32)
        return _fold(product, len(parts) // len(weight), 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        hidden, weight = ctx.saved_tensors
        parts = split(grads[0], 1)  # [T, 3E]
        # The gradient of tokens is rounded to bf16: the first part of the weight will do for it.
        d_hidden = parts @ weight.to(torch.bfloat16).repeat(3, 1)  # [T, H]
        product = torch.mm(parts.T, hidden, out_dtype=torch.float32)  # [3E, H]
        return d_hidden, _fold(product, 3, 0).to(weight.dtype)


def fits(hidden: Tensor, weight: Tensor) -> bool:
    """Whether `GateLogits` takes these operands."""
    dtypes = (torch.bfloat16, torch.float32)
    return hidden.is_cuda and hidden.dtype == torch.bfloat16 and weight.dtype in dtypes


def gate_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """Return `hidden` [T, H] times `weight` [E, H] transposed, [T, E] fp32; see `fits`."""
    result: Tensor = GateLogits.apply(hidden, weight)
    return result
