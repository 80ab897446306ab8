"""The grouped product in bf16: rows times their expert's matrix, forward and data gradient.

Both operands reach shared memory through TMA (Hopper and newer). With few rows of each expert the
matrices are most of what is read: tiles of 64 rows hold fewer rows of other experts, and more steps
of the sum are under way. Every element is summed along the same steps whatever the tile, so its
bits do not depend on how many rows there are.
"""

import torch
import triton.language as tl
from torch import Tensor

from ep_plugin.moe.kernels._launch import cdiv, jit
from ep_plugin.moe.kernels.tiles import in_bands, num_programs, planned, tiled, tiled_each
from ep_plugin.moe.kernels.types import TILE

LOW = 64  # rows of a tile of few
WIDE = 256  # columns of a tile
DEPTH = 64  # of one step along the sum
BAND = 8  # rows of tiles in a band, see `tiles.in_bands`
# Rows of an expert on average: from here on tiles are high, four steps are under way, three are.
# Absent choices count too where the host does not know how many there are: it costs speed alone.
FEW_ROWS, SOME_ROWS, MANY_ROWS = 48, 192, 1024


@jit
def _multiply_kernel(
    rows, matrices, ends, expert_of, row_of, tile_ends, out, num_experts, IN, OUT,
    TILE: tl.constexpr, WIDE: tl.constexpr, DEPTH: tl.constexpr, BAND: tl.constexpr,
    BACK: tl.constexpr,
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
            if BACK:
                y = matrices.load([expert, depth, tile_column * WIDE])
                sums = tl.dot(x, y.reshape(DEPTH, WIDE), sums)
            else:
                y = matrices.load([expert, tile_column * WIDE, depth])
                sums = tl.dot(x, y.reshape(WIDE, DEPTH).T, sums)
        row = first + tl.arange(0, TILE)
        column = tile_column * WIDE + tl.arange(0, WIDE)
        mine = row < tl.load(ends + expert)
        there = column < OUT
        target = out + row.to(tl.int64)[:, None] * OUT + column[None, :]
        tl.store(target, sums.to(out.dtype.element_ty), mask=mine[:, None] & there[None, :])


def multiply_rows(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Return each row of `rows` [R, a] times its expert's `weight` [e, b, a].T: [R, b] bf16.

    `ends` [e] int32 is the row after each expert's last. Rows past the last expert's are not
    written. a and b are multiples of 8.
    """
    return _multiply(rows, weight, ends, weight.shape[2], weight.shape[1], back=False)


def multiply_grads(grads: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Return each row of `grads` [R, b] times its expert's `weight` [e, b, a]: [R, a] bf16.

    As `multiply_rows` otherwise.
    """
    return _multiply(grads, weight, ends, weight.shape[1], weight.shape[2], back=True)


def _multiply(
    rows: Tensor, weight: Tensor, ends: Tensor, in_size: int, out_size: int, back: bool
) -> Tensor:
    num_rows, num_experts = rows.shape[0], weight.shape[0]
    out = torch.empty(num_rows, out_size, dtype=rows.dtype, device=rows.device)
    if not out.numel():
        return out
    average = num_rows / num_experts
    tile, warps, stages = (LOW, 4, 5) if average < FEW_ROWS else (TILE, 8, 3)
    if SOME_ROWS <= average < MANY_ROWS:
        stages = 4
    tiles = planned(num_rows, ends, tile)
    rows, weight = rows.contiguous(), weight.contiguous()
    box = (DEPTH, WIDE) if back else (WIDE, DEPTH)
    _multiply_kernel[(num_programs(ends.device, tiles.expert.shape[0] * cdiv(out_size, WIDE)),)](
        *(tiled(rows, tile, DEPTH), tiled_each(weight, *box)),
        *(ends, tiles.expert, tiles.row, tiles.ends, out, num_experts, in_size, out_size),
        TILE=tile,
        WIDE=WIDE,
        DEPTH=DEPTH,
        BAND=BAND,
        BACK=back,
        num_warps=warps,
        num_stages=stages,
    )
    return out
