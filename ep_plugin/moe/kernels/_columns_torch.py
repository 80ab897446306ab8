"""Operands of FP8 weight gradients in plain torch: rows of experts, transposed into columns.

Both FP8 recipes use them: that with one scale per row and that with one per block. P is the number
of columns: 128 for each tile, the last ones of an expert being padding.
"""

import torch
from torch import Tensor

from ep_plugin.moe.kernels.types import TILE, Tiles


def sources(
    tiles: Tiles, order: Tensor, ends: Tensor, choices: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return three facts on each column: its expert, whether it is real, and what it is read from.

    They are [P] int64, [P] bool (False for padding) and [P] int64. With `choices` 0 a column is
    read from a row of the experts; otherwise from a token, and tokens have `choices` choices each.
    `order` [R] int32 is the flat choice of each row, `ends` [e] int32 the end of each expert's
    rows.
    """
    row = (tiles.row.unsqueeze(1) + torch.arange(TILE, device=ends.device)).flatten()
    expert = tiles.expert.repeat_interleave(TILE).long()
    there = (expert >= 0) & (row < ends[expert])
    source = torch.where(there, row, 0).long()
    return expert, there, order[source].long() // choices if choices else source


def products(left: Tensor, right: Tensor, tiles: Tiles) -> Tensor:
    """Return for each expert `left` [b, P] @ `right` [a, P].T over its columns: [e, b, a]."""
    ends = (tiles.ends * TILE).tolist()
    parts = [torch.tensor_split(columns, ends, dim=1)[:-1] for columns in (left, right)]
    return torch.stack([x @ y.T for x, y in zip(*parts, strict=True)])
