"""Rounding to e4m3 by blocks: the plain-torch twins of `kernels.blocks`."""

import torch
from torch import Tensor

from ep_plugin.e4m3 import BLOCK, E4M3, Blocks8, power_of_two_scale


def quantize_blocks(matrix: Tensor) -> Blocks8:
    """Return `matrix` [R, X] in e4m3, each 128 columns of a row with their own scale."""
    blocks = matrix.float().unflatten(1, (-1, BLOCK))  # [R, X / 128, 128]
    scale = power_of_two_scale(blocks.abs().amax(dim=2))
    return Blocks8((blocks / scale.unsqueeze(2)).to(E4M3).flatten(1), scale)


def dequantize_blocks(blocks: Blocks8) -> Tensor:
    """Return [R, X] bf16; nothing is rounded."""
    wide: Tensor = blocks.data.float().unflatten(1, (-1, BLOCK)) * blocks.scale.unsqueeze(2)
    return wide.flatten(1).bfloat16()


def round_rows(rows: Tensor, ends: Tensor) -> Tensor:
    """Return `rows` [R, X] rounded to e4m3 by 128 columns: bf16, rows behind the last left out."""
    inside = torch.arange(len(rows), device=ends.device) < ends[-1]
    return dequantize_blocks(quantize_blocks(rows.masked_fill(~inside.unsqueeze(1), 0)))


def round_columns(rows: Tensor, ends: Tensor) -> Tensor:
    """Return `rows` [R, X] rounded to e4m3 by 128 rows of an expert: bf16.

    Each expert's blocks begin at its first row, and its last block may be shorter.
    """
    row = torch.arange(len(rows), device=ends.device)
    expert = torch.searchsorted(ends, row.int(), right=True).clamp(max=len(ends) - 1)
    first = torch.cat([ends.new_zeros(1), ends])[expert]
    widest = len(rows) // BLOCK + 1  # blocks of one expert at most
    block = expert * widest + (row - first) // BLOCK
    inside = (row < ends[-1]).unsqueeze(1)
    wide = rows.float().masked_fill(~inside, 0)
    largest = wide.new_zeros(len(ends) * widest, rows.shape[1])
    largest.scatter_reduce_(0, block.unsqueeze(1).expand_as(wide), wide.abs(), "amax")
    scale = power_of_two_scale(largest)[block]
    rounded: Tensor = (wide / scale).to(E4M3).float() * scale
    return rounded.bfloat16()


def round_weight(weight: Tensor) -> Tensor:
    """Return `weight` [e, b, a] rounded to e4m3 by 128 x 128 values: bf16."""
    blocks = weight.float().unflatten(2, (-1, BLOCK)).unflatten(1, (-1, BLOCK))
    scale = power_of_two_scale(blocks.abs().amax(dim=(2, 4), keepdim=True))
    rounded: Tensor = (blocks / scale).to(E4M3).float() * scale  # [e, b / 128, 128, a / 128, 128]
    return rounded.bfloat16().flatten(3, 4).flatten(1, 2)
