"""Columns of weight gradients in plain torch, whether scales go by rows or by blocks."""

import torch
from torch import Tensor

from ep_plugin.moe.kernels.types import TILE, Tiles


def sources(
    tiles: Tiles, order: Tensor, ends: Tensor, choices: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return each column's expert, whether it is no padding, and its row, or token: [P].

    `choices` 0 says that columns are rows; else they are tokens with so many choices each.
    """
    row = (tiles.row.unsqueeze(1) + torch.arange(TILE, device=ends.device)).flatten()
    expert = tiles.expert.repeat_interleave(TILE).long()
    there = (expert >= 0) & (row < ends[expert])
    source = torch.where(there, row, 0).long()
    return expert, there, order[source].long() // choices if choices else source


def products(left: Tensor, right: Tensor, tiles: Tiles) -> Tensor:
    """Return each expert's `left` [b, P] times `right` [a, P] transposed: [e, b, a]."""
    ends = (tiles.ends * TILE).tolist()
    parts = [torch.tensor_split(columns, ends, dim=1)[:-1] for columns in (left, right)]
    return torch.stack([x @ y.T for x, y in zip(*parts, strict=True)])
