"""Tiles of grouped products: which rows form a tile, the order of tiles, how they are loaded."""

from functools import cache
from math import prod
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from triton.tools.tensor_descriptor import TensorDescriptor

from ep_plugin.moe.kernels._launch import cdiv, jit, next_power_of_2
from ep_plugin.moe.kernels.types import TILE, Tiles

BLOCK = 64  # tiles that one program plans
# Tiles of rows, by their ends; they belong to the stream on which they were planned.
_PLANNED: Any = WeakTensorKeyDictionary()


@jit
def _plan_kernel(
    ends, expert_of, row_of, tile_ends, num_experts, num_tiles,
    TILE: tl.constexpr, BLOCK: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    expert = tl.arange(0, EXPERTS)
    inside = expert < num_experts
    end = tl.load(ends + expert, mask=inside, other=0)
    start = tl.load(ends + expert - 1, mask=inside & (expert > 0), other=0)
    tiles = tl.where(inside, (end - start + TILE - 1) // TILE, 0)
    behind = tl.cumsum(tiles, axis=0)
    first = behind - tiles
    tile = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    owned = (tile[:, None] >= first[None, :]) & (tile[:, None] < behind[None, :])
    row = start[None, :] + (tile[:, None] - first[None, :]) * TILE
    owner = tl.max(tl.where(owned, expert[None, :], -1), axis=1)
    tl.store(expert_of + tile, owner, mask=tile < num_tiles)
    tl.store(row_of + tile, tl.max(tl.where(owned, row, -1), axis=1), mask=tile < num_tiles)
    if tl.program_id(0) == 0:
        tl.store(tile_ends + expert, behind, mask=inside)


def plan_tiles(num_rows: int, ends: Tensor, height: int = TILE) -> Tiles:
    """Return the tiles, of `height` rows, of at most `num_rows` rows.

    `ends` [e] int32 is the row after each expert's last.
    """
    num_experts = ends.shape[0]
    num_tiles = num_rows // height + num_experts  # enough for any counts
    expert, row, tile_ends = (ends.new_empty(n) for n in (num_tiles, num_tiles, num_experts))
    _plan_kernel[(cdiv(num_tiles, BLOCK),)](
        *(ends, expert, row, tile_ends, num_experts, num_tiles),
        TILE=height,
        BLOCK=BLOCK,
        EXPERTS=next_power_of_2(num_experts),
    )
    return Tiles(expert, row, tile_ends)


def planned(num_rows: int, ends: Tensor, height: int) -> Tiles:
    """Return `plan_tiles`, planned once for products over the same rows, which share `ends`.

    It is planned anew when torch has changed `ends`, and for each product that a CUDA graph
    captures: its replays, which may find other ends in the same place, are to plan too.
    """
    if ends.is_inference() or (ends.is_cuda and torch.cuda.is_current_stream_capturing()):
        return plan_tiles(num_rows, ends, height)  # those of inference do not say when they change
    key, found = (num_rows, height, ends._version), _PLANNED.get(ends)
    if found is None or found[0] != key:
        found = key, plan_tiles(num_rows, ends, height)
        _PLANNED[ends] = found
    tiles: Tiles = found[1]
    return tiles


@triton.jit
def in_bands(tile, down, across, BAND: tl.constexpr):
    """Return the row and column of a tile, counted in tiles, in a grid of `down` x `across`.

    Tiles are numbered column by column inside bands of BAND rows of tiles. So tiles with near
    numbers, which run at the same time, are neighbours.
    """
    band = tile // (BAND * across)
    height = tl.minimum(down - band * BAND, BAND)
    inside = tile % (BAND * across)
    return band * BAND + inside % height, inside // height


@triton.jit
def span(ends, expert):
    """Return an expert's first row (or tile), and the one after its last."""
    end = tl.load(ends + expert)
    start = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    return start, end


def tiled(matrix: Tensor, height: int, width: int) -> TensorDescriptor:
    """Return a TMA descriptor of `matrix` [X, Y] for tiles of [height, width].

    Matrices [e, X, Y], contiguous, are taken as one below the other. Rows must start at multiples
    of 16 bytes. Outside of the matrix zeros are read.
    """
    *outer, columns = matrix.shape
    *_, row, column = matrix.stride()
    return TensorDescriptor(matrix, [prod(outer), columns], [row, column], [height, width])


def tiled_each(matrices: Tensor, height: int, width: int) -> TensorDescriptor:
    """Return a TMA descriptor of `matrices` [e, X, Y] for tiles of [1, height, width].

    As `tiled`, but outside of its own matrix a tile reads zeros, not the next matrix, and writes
    nothing.
    """
    size, strides = list(matrices.shape), list(matrices.stride())
    return TensorDescriptor(matrices, size, strides, [1, height, width])


def num_programs(device: torch.device, num_tiles: int, each: int = 1) -> int:
    """Return how many programs share `num_tiles` tiles: at most `each` per multiprocessor."""
    return min(each * _processors(device), num_tiles)


@cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1  # Triton's interpreter
    return torch.cuda.get_device_properties(device).multi_processor_count
