"""Plain-torch twins of `kernels._on_cuda`: the same functions, the same rounding, any device.

Rows past the last expert's belong to absent choices. The kernels do not write them; the twins set
them to zero.
"""

import torch
from torch import Tensor

from ep_plugin.moe.e4m3 import E4M3, Columns8, Rows8, Weight8
from ep_plugin.moe.kernels._columns_torch import products, sources
from ep_plugin.moe.kernels.activation_torch import activate, activate_backward
from ep_plugin.moe.kernels.blocks_torch import (
    add_wgrad_blocks,
    multiply_blocks,
    multiply_column_blocks,
    quantize_blocks,
    quantize_weight_blocks,
    transpose_blocks,
)
from ep_plugin.moe.kernels.quantize_torch import quantize_rows
from ep_plugin.moe.kernels.rows_torch import (
    count_choices,
    sort_choices,
    spread_rows,
    spread_rows8,
    sum_pieces,
    sum_rows,
)
from ep_plugin.moe.kernels.sends_torch import count_sends, place_sends, take_own, zero_absent
from ep_plugin.moe.kernels.types import TILE, Tiles

__all__ = [  # re-exported from the modules above
    "activate",
    "activate_backward",
    "add_wgrad_blocks",
    "count_choices",
    "count_sends",
    "multiply_blocks",
    "multiply_column_blocks",
    "place_sends",
    "quantize_blocks",
    "quantize_rows",
    "quantize_weight_blocks",
    "sort_choices",
    "spread_rows",
    "spread_rows8",
    "sum_pieces",
    "sum_rows",
    "take_own",
    "transpose_blocks",
    "zero_absent",
]


def plan_tiles(num_rows: int, ends: Tensor) -> Tiles:
    """Return the tiles of at most `num_rows` rows; each expert's end at `ends` [e] int32."""
    num_experts = len(ends)
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    tiles = (ends - starts + TILE - 1) // TILE
    tile_ends = tiles.cumsum(0, dtype=torch.int32)
    tile = torch.arange(num_rows // TILE + num_experts, dtype=torch.int32, device=ends.device)
    owner = torch.searchsorted(tile_ends, tile, right=True)
    known = owner.clamp(max=num_experts - 1)
    row = starts[known] + (tile - (tile_ends - tiles)[known]) * TILE
    absent = owner == num_experts
    return Tiles(owner.int().masked_fill(absent, -1), row.int().masked_fill(absent, -1), tile_ends)


def transpose_rows(
    rows: Rows8, tiles: Tiles, order: Tensor, ends: Tensor, choices: int
) -> Columns8:
    """Return `rows` [*, X] transposed to [X, P], tile after tile, with one scale per expert.

    It is the largest scale of the expert's rows. P is 128 for each tile. With `choices` 0, `rows`
    are rows of the experts; otherwise they are tokens with `choices` choices each, and `order`
    [R] int32 is the flat choice of each row.
    """
    width, largest = rows.data.shape[1], torch.ones(len(ends), device=ends.device)
    if not (len(rows.data) and len(order)):  # columns are padding alone
        columns = torch.zeros(width, len(tiles.row) * TILE, device=ends.device)
        return Columns8(columns.to(E4M3), largest)
    expert, there, source = sources(tiles, order, ends, choices)
    scale = torch.where(there, rows.scale[source], 0.0)  # [P]
    found = scale.new_zeros(len(ends)).scatter_reduce(0, expert.clamp(min=0), scale, "amax")
    largest = torch.where(found > 0, found, largest)
    ratio = scale / largest[expert]
    moved = (rows.data.float()[source] * ratio.unsqueeze(1)).masked_fill(~there.unsqueeze(1), 0)
    return Columns8(moved.to(E4M3).T.contiguous(), largest)


def quantize_weight(weight: Tensor) -> tuple[Weight8, Weight8]:
    """Return `weight` [e, b, a] in e4m3, and its transpose [e, a, b].

    `weight` has one scale per row, its transpose one per expert.
    """
    num_experts, num_rows, width = weight.shape
    rows = quantize_rows(weight.reshape(-1, width))
    scale = rows.scale.view(num_experts, num_rows)
    data = rows.data.view(weight.shape)
    largest = scale.amax(dim=1)
    moved = data.float() * (scale / largest.unsqueeze(1)).unsqueeze(2)
    transposed = moved.transpose(1, 2).contiguous().to(E4M3)
    return Weight8(data, scale), Weight8(transposed, largest.unsqueeze(1).repeat(1, width))


def add_wgrad(total: Tensor, left: Tensor, right: Tensor, ends: Tensor) -> None:
    """Add, for each expert's rows, `left` [R, b].T @ `right` [R, a] to `total` [e, b, a] fp32."""
    blocks = [torch.tensor_split(m.float(), ends.tolist())[:-1] for m in (left, right)]
    for matrix, x, y in zip(total, *blocks, strict=True):
        matrix += x.T @ y


def multiply(rows: Rows8, weight: Weight8, ends: Tensor, tiles: Tiles) -> Tensor:
    """Return each row of `rows` [R, a] times its expert's `weight` [e, b, a].T: [R, b] bf16."""
    blocks = torch.tensor_split(rows.data.float(), ends.tolist())
    products = [b @ w.T for b, w in zip(blocks[:-1], weight.data.float(), strict=True)]
    scales = weight.scale.repeat_interleave(torch.diff(ends, prepend=ends.new_zeros(1)), dim=0)
    inside = torch.cat(products) * scales * rows.scale[: len(scales), None]
    rest = inside.new_zeros(len(rows.data) - len(inside), inside.shape[1])
    return torch.cat([inside, rest]).bfloat16()


def multiply_columns(left: Columns8, right: Columns8, tiles: Tiles) -> Tensor:
    """Return for each expert `left` [b, P] @ `right` [a, P].T over its columns: [e, b, a] bf16."""
    return _columns_product(left, right, tiles).bfloat16()


def add_wgrad8(total: Tensor, left: Columns8, right: Columns8, tiles: Tiles) -> None:
    """Add each expert's `left` [b, P] @ `right` [a, P].T to its part of `total` [e, b, a] fp32."""
    total += _columns_product(left, right, tiles)


def _columns_product(left: Columns8, right: Columns8, tiles: Tiles) -> Tensor:
    scale = (left.scale * right.scale)[:, None, None]
    return products(left.data.float(), right.data.float(), tiles) * scale
