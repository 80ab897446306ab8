"""The grouped product in e4m3: rows times their expert's weight, forward and data gradient.

Both operands reach shared memory through TMA (Hopper and newer). A GPU at its power limit is faster
the fewer bytes it moves per operation. Therefore tiles are 128 x 256, and the tiles in work at one
time lie close together, in a band, so that they share operands in L2. Sums are those of torch's
scaled grouped GEMM, bit for bit. With few rows of each expert tiles are 64 x 256: fewer of their
rows are another expert's, and more steps of the sum are under way.
"""

import torch
import triton.language as tl
from torch import Tensor

from ep_plugin.moe.e4m3 import Rows8, Weight8
from ep_plugin.moe.kernels._launch import cdiv, jit
from ep_plugin.moe.kernels.tiles import in_bands, num_programs, planned, tiled
from ep_plugin.moe.kernels.types import TILE, Tiles

WIDE = 256  # columns of a tile; it has TILE rows
DEPTH = 128  # of one step along the sum
LOW = 64  # rows of a tile of few
FEW_ROWS = 112  # per expert on average; below it tiles have LOW rows
MANY_ROWS = 1024  # per expert on average; from here on the tiles of a band mostly share a weight


@jit
def _multiply_kernel(
    rows, weight, row_scale, weight_scale, ends, expert_of, row_of, tile_ends, out,
    num_experts, IN, OUT,
    TILE: tl.constexpr, WIDE: tl.constexpr, DEPTH: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    down = tl.load(tile_ends + num_experts - 1)
    across = (OUT + WIDE - 1) // WIDE
    # Flattened, so that the next tile's first operands load while this tile's sums are stored.
    programs = tl.num_programs(0)
    for tile in tl.range(tl.program_id(0), down * across, programs, flatten=True):
        tile_row, tile_column = in_bands(tile, down, across, BAND)
        expert = tl.load(expert_of + tile_row)
        first = tl.load(row_of + tile_row)
        sums = tl.zeros((TILE, WIDE), tl.float32)
        for depth in range(0, IN, DEPTH):
            # The tile may include rows of the next expert; their sums are not stored.
            x = rows.load([first, depth])
            y = weight.load([expert * OUT + tile_column * WIDE, depth])
            sums = tl.dot(x, y.T, sums)
        row = first + tl.arange(0, TILE)
        column = tile_column * WIDE + tl.arange(0, WIDE)
        mine = row < tl.load(ends + expert)
        there = column < OUT
        left = tl.load(row_scale + row, mask=mine, other=0.0)
        right = tl.load(weight_scale + expert * OUT + column, mask=there, other=0.0)
        sums = sums * left[:, None] * right[None, :]
        target = out + row.to(tl.int64)[:, None] * OUT + column[None, :]
        tl.store(target, sums.to(out.dtype.element_ty), mask=mine[:, None] & there[None, :])


def multiply(rows: Rows8, weight: Weight8, ends: Tensor, tiles: Tiles) -> Tensor:
    """Return each row of `rows` [R, a] times its expert's `weight` [e, b, a].T: [R, b] bf16.

    `ends` [e] int32 is the row after each expert's last. Rows past the last expert's are not
    written. a is a multiple of 16.
    """
    (num_experts, out_features, in_features), num_rows = weight.data.shape, rows.data.shape[0]
    out = torch.empty(num_rows, out_features, dtype=torch.bfloat16, device=ends.device)
    if out.numel():
        across, tile, warps, stages = cdiv(out_features, WIDE), TILE, 8, 3
        if num_rows < FEW_ROWS * num_experts:
            tile, warps, stages = LOW, 4, 4
            tiles = planned(num_rows, ends, tile)
        _multiply_kernel[(num_programs(ends.device, tiles.expert.shape[0] * across),)](
            *(tiled(rows.data, tile, DEPTH), tiled(weight.data, WIDE, DEPTH)),
            *(rows.scale, weight.scale, ends, tiles.expert, tiles.row, tiles.ends, out),
            *(num_experts, in_features, out_features),
            TILE=tile,
            WIDE=WIDE,
            DEPTH=DEPTH,
            BAND=16 if num_rows >= MANY_ROWS * num_experts else 8,
            num_warps=warps,
            num_stages=stages,
        )
    return out
