"""FP8 with block scales in plain torch: the twins of `kernels.blocks` and `block_product`."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ep_plugin.moe.e4m3 import (
    BLOCK,
    E4M3,
    Blocks8,
    ColumnBlocks8,
    WeightBlocks8,
    whole_blocks,
)
from ep_plugin.moe.kernels._columns_torch import products, sources
from ep_plugin.moe.kernels.quantize_torch import power_of_two_scale
from ep_plugin.moe.kernels.types import TILE, Tiles


def quantize_blocks(matrix: Tensor) -> Blocks8:
    """Return `matrix` [R, X] in e4m3, with one scale for each 128 columns of a row."""
    width = matrix.shape[1]
    whole = F.pad(matrix.float(), (0, whole_blocks(width) - width))
    blocks = whole.unflatten(1, (-1, BLOCK))  # [R, X / 128, 128]
    scale = power_of_two_scale(blocks.abs().amax(dim=2))
    return Blocks8((blocks / scale.unsqueeze(2)).to(E4M3).flatten(1), scale)


def dequantize_blocks(blocks: Blocks8) -> Tensor:
    """Return the values [R, X] in fp32; nothing is rounded."""
    wide: Tensor = blocks.data.float().unflatten(1, (-1, BLOCK)) * blocks.scale.unsqueeze(2)
    return wide.flatten(1)


def quantize_weight_blocks(weight: Tensor, parts: int = 1) -> tuple[WeightBlocks8, WeightBlocks8]:
    """Return `weight` [e, b, a] and its transpose [e, a, b] in e4m3, one scale per 128 x 128.

    b and a are padded with zeros to multiples of 128; b in each of `parts` equal parts, as gate and
    up of a gated activation.
    """
    rows, width = weight.shape[1] // parts, weight.shape[2]
    missing = (0, whole_blocks(width) - width, 0, whole_blocks(rows) - rows)
    whole = F.pad(weight.float().unflatten(1, (parts, rows)), missing).flatten(1, 2)
    blocks = whole.unflatten(2, (-1, BLOCK)).unflatten(1, (-1, BLOCK))
    scale = power_of_two_scale(blocks.abs().amax(dim=(2, 4)))  # [e, b / 128, a / 128]
    data = (blocks / scale[:, :, None, :, None]).to(E4M3).flatten(3, 4).flatten(1, 2)
    turned = data.transpose(1, 2).contiguous(), scale.transpose(1, 2).contiguous()
    _, rows, width = whole.shape
    return WeightBlocks8(data, scale, rows), WeightBlocks8(*turned, width)


def dequantize_weight_blocks(weight: WeightBlocks8) -> Tensor:
    """Return the values [e, b, a] in fp32; nothing is rounded."""
    scale = weight.scale.repeat_interleave(BLOCK, dim=1).repeat_interleave(BLOCK, dim=2)
    return weight.data.float() * scale


def transpose_blocks(
    rows: Blocks8, tiles: Tiles, order: Tensor, ends: Tensor, choices: int
) -> ColumnBlocks8:
    """Return `rows` [*, X] transposed to [X, P], tile after tile, with one scale per 128 x 128.

    It is the largest scale in that block. P is 128 for each tile. With `choices` 0, `rows` are
    rows of the experts; otherwise they are tokens with `choices` choices each, and `order` [R]
    int32 is the flat choice of each row.
    """
    width, num_blocks, num_tiles = rows.data.shape[1], rows.scale.shape[1], len(tiles.row)
    if not (len(rows.data) and len(order)):  # columns are padding alone
        data = torch.zeros(width, num_tiles * TILE, device=ends.device).to(E4M3)
        return ColumnBlocks8(data, torch.ones(num_tiles, num_blocks, device=ends.device))
    _, there, source = sources(tiles, order, ends, choices)
    scale = rows.scale[source].masked_fill(~there.unsqueeze(1), 0)  # [P, X / 128]
    largest = scale.unflatten(0, (-1, TILE)).amax(dim=1)  # [P / 128, X / 128]
    largest = torch.where(largest > 0, largest, 1.0)
    ratio = scale / largest.repeat_interleave(TILE, dim=0)
    values = rows.data.float()[source].masked_fill(~there.unsqueeze(1), 0)
    moved = (values.unflatten(1, (-1, BLOCK)) * ratio.unsqueeze(2)).flatten(1)
    return ColumnBlocks8(moved.to(E4M3).T.contiguous(), largest)


def dequantize_columns(columns: ColumnBlocks8) -> Tensor:
    """Return the values [X, P] in fp32; nothing is rounded."""
    scale = columns.scale.T.repeat_interleave(BLOCK, dim=0).repeat_interleave(TILE, dim=1)
    return columns.data.float() * scale


def multiply_blocks(rows: Blocks8, weight: WeightBlocks8, ends: Tensor, tiles: Tiles) -> Tensor:
    """Return each row of `rows` [R, a] times its expert's `weight` [e, b, a].T: [R, width] bf16.

    `width` is that of `weight`, b or less.
    """
    parts = torch.tensor_split(dequantize_blocks(rows), ends.tolist())
    weights = dequantize_weight_blocks(weight)[:, : weight.width]
    products = [part @ w.T for part, w in zip(parts[:-1], weights, strict=True)]
    rest = parts[-1].new_zeros(len(parts[-1]), weights.shape[1])
    return torch.cat([*products, rest]).bfloat16()


def multiply_column_blocks(
    left: ColumnBlocks8, right: ColumnBlocks8, tiles: Tiles, size: tuple[int, int], parts: int = 1
) -> Tensor:
    """Return for each expert `left` [b, P] @ `right` [a, P].T over its columns: [e, *size] bf16.

    `size` is b and a without padding; b is padded in each of `parts` equal parts.
    """
    return _columns_product(left, right, tiles, size, parts).bfloat16()


def add_wgrad_blocks(
    total: Tensor, left: ColumnBlocks8, right: ColumnBlocks8, tiles: Tiles, parts: int = 1
) -> None:
    """Add what `multiply_column_blocks` returns to `total` [e, b, a] fp32, which has no padding."""
    _, b, a = total.shape
    total += _columns_product(left, right, tiles, (b, a), parts)


def _columns_product(
    left: ColumnBlocks8, right: ColumnBlocks8, tiles: Tiles, size: tuple[int, int], parts: int
) -> Tensor:
    whole = products(dequantize_columns(left), dequantize_columns(right), tiles)
    rows, width = size
    apart = whole.view(len(whole), parts, -1, whole.shape[2])
    return apart[:, :, : rows // parts, :width].flatten(1, 2)
