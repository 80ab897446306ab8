"""Rounding to e4m3 by blocks: the plain-torch twins of `kernels.blocks` and `block_columns`."""

import torch
from torch import Tensor

from ep_plugin.e4m3 import BLOCK, E4M3, Blocks8, power_of_two_scale
from ep_plugin.kernels import Tiles


def quantize_blocks(matrix: Tensor) -> Blocks8:
    """Return `matrix` [R, X] in e4m3, each 128 columns of a row with their own scale."""
    blocks = matrix.float().unflatten(1, (-1, BLOCK))  # [R, X / 128, 128]
    scale = power_of_two_scale(blocks.abs().amax(dim=2))
    return Blocks8((blocks / scale.unsqueeze(2)).to(E4M3).flatten(1), scale)


def dequantize_blocks(blocks: Blocks8) -> Tensor:
    """Return [R, X] fp32; nothing is rounded."""
    wide: Tensor = blocks.data.float().unflatten(1, (-1, BLOCK)) * blocks.scale.unsqueeze(2)
    return wide.flatten(1)


def round_rows(rows: Tensor, ends: Tensor) -> Tensor:
    """Return `rows` [R, X] rounded to e4m3 by 128 columns: bf16."""
    inside = torch.arange(len(rows), device=ends.device) < ends[-1]
    blocks = quantize_blocks(rows.masked_fill(~inside.unsqueeze(1), 0))
    return dequantize_blocks(blocks).bfloat16()


def spread_blocks(
    tokens: Tensor | Blocks8, place: Tensor, ends: Tensor, num_rows: int | None = None
) -> Tensor:
    """Return the token of each row, rounded to e4m3 by 128 columns: [R, X] bf16.

    Rows of `tokens` [N, X] are at `place` [N, C]. R is `num_rows`, at least the last of `ends`, or
    N * C.
    """
    blocks = tokens if isinstance(tokens, Blocks8) else quantize_blocks(tokens)
    rounded = dequantize_blocks(blocks).bfloat16().repeat_interleave(place.shape[1], dim=0)
    rows = torch.empty_like(rounded)
    rows[place.flatten()] = rounded
    inside = torch.arange(len(rows), device=ends.device) < ends[-1]
    return rows.masked_fill(~inside.unsqueeze(1), 0)[:num_rows]


def round_columns(
    source: Tensor | Blocks8, tiles: Tiles, order: Tensor, ends: Tensor, choices: int = 0
) -> Tensor:
    """Return rows [R, X] rounded to e4m3, each tile of an expert's rows with its scales: bf16.

    `choices` 0 says that `source` are the rows; else they are tokens with so many choices each,
    and `order` [R] says which choice a row is of.
    """
    rows = dequantize_blocks(source) if isinstance(source, Blocks8) else source
    if choices:
        rows = rows[order.long() // choices]
    row = torch.arange(len(rows), dtype=torch.int32, device=ends.device)
    wide = rows.float().masked_fill((row >= ends[-1]).unsqueeze(1), 0)
    tile = torch.searchsorted(tiles.row[tiles.expert >= 0], row, right=True)
    largest = wide.new_zeros(1 + len(tiles.row), rows.shape[1])
    largest.scatter_reduce_(0, tile.unsqueeze(1).expand_as(wide), wide.abs(), "amax")
    scale = power_of_two_scale(largest)[tile]
    rounded: Tensor = (wide / scale).to(E4M3).float() * scale
    return rounded.bfloat16()


def round_weight(weight: Tensor) -> Tensor:
    """Return `weight` [e, b, a] rounded to e4m3 by 128 x 128 values: bf16."""
    blocks = weight.float().unflatten(2, (-1, BLOCK)).unflatten(1, (-1, BLOCK))
    scale = power_of_two_scale(blocks.abs().amax(dim=(2, 4), keepdim=True))
    rounded: Tensor = (blocks / scale).to(E4M3).float() * scale  # [e, b / 128, 128, a / 128, 128]
    return rounded.bfloat16().flatten(3, 4).flatten(1, 2)
