"""Weight gradients added to fp32 totals as they are made: what a training loop would do after.

A grouped product that writes bf16 leaves a matrix to be written, read again and added: 12 bytes of
traffic for each weight, where adding in the product's own epilogue moves 8. With many experts of
few rows each that traffic, not arithmetic, is what a weight gradient costs.

One program owns one tile of one expert's matrix and adds it once: no atomics, equal every time.
"""

import triton
import triton.language as tl
from torch import Tensor

from ep_plugin.e4m3 import Columns8
from ep_plugin.kernels._launch import jit

BAND = 8  # rows of tiles
MANY_ROWS = 1024  # of an expert, on average: from there on larger tiles are faster (H100)


@jit
def _wgrad_kernel(
    left, right, left_scale, right_scale, ends, total, num_experts,
    B, A, LEFT_B, LEFT_ROW, RIGHT_A, RIGHT_ROW,
    SCALED: tl.constexpr, TILE_B: tl.constexpr, TILE_A: tl.constexpr, DEPTH: tl.constexpr,
    BAND: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(1)
    end = tl.load(ends + expert)
    start = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    if start >= end:
        return
    if SCALED:  # experts' columns are padded to 16, and 16 bytes are read at a time
        start = tl.multiple_of(start, 16)
    # Tiles in bands of BAND rows of tiles, so that those at work together share their operands.
    across = (A + TILE_A - 1) // TILE_A
    down = (B + TILE_B - 1) // TILE_B
    band = tl.program_id(0) // (BAND * across)
    height = tl.minimum(down - band * BAND, BAND)
    inside = tl.program_id(0) % (BAND * across)
    first_b = (band * BAND + inside % height) * TILE_B
    first_a = inside // height * TILE_A
    b = tl.arange(0, TILE_B)
    a = tl.arange(0, TILE_A)
    row = tl.arange(0, DEPTH)
    # One wide address for a tile, and narrow offsets in it: half the registers.
    left += first_b.to(tl.int64) * LEFT_B + start.to(tl.int64) * LEFT_ROW
    right += first_a.to(tl.int64) * RIGHT_A + start.to(tl.int64) * RIGHT_ROW
    lefts = b[:, None] * LEFT_B + row[None, :] * LEFT_ROW
    rights = row[:, None] * RIGHT_ROW + a[None, :] * RIGHT_A
    b_inside = (b < B - first_b)[:, None]
    a_inside = (a < A - first_a)[None, :]
    sums = tl.zeros((TILE_B, TILE_A), tl.float32)
    for first in range(start, end, DEPTH):
        left_over = end - first
        if SCALED:
            left_over = tl.multiple_of(left_over, 16)
        there = row < left_over
        x = tl.load(left + lefts, mask=b_inside & there[None, :], other=0.0)
        y = tl.load(right + rights, mask=there[:, None] & a_inside, other=0.0)
        sums = tl.dot(x, y, sums)
        left += DEPTH * LEFT_ROW
        right += DEPTH * RIGHT_ROW
    if SCALED:
        sums *= tl.load(left_scale + expert * B) * tl.load(right_scale + expert * A)
    total += (expert.to(tl.int64) * B + first_b) * A + first_a
    cell = b[:, None] * A + a[None, :]
    owned = b_inside & a_inside
    tl.store(total + cell, tl.load(total + cell, mask=owned, other=0.0) + sums, mask=owned)


def add_wgrad(total: Tensor, left: Tensor, right: Tensor, ends: Tensor) -> None:
    """Add each expert's `left` [R, b] transposed times `right` [R, a] to `total` [e, b, a] fp32.

    `left` and `right` are bf16, `ends` [e] int32 the rows at which experts end. Sums are in fp32.
    """
    strides = (1, left.shape[1], 1, right.shape[1])
    _add(total, left.contiguous(), right.contiguous(), None, ends, strides)


def add_wgrad8(total: Tensor, left: Columns8, right: Columns8, ends: Tensor) -> None:
    """Add each expert's `left` [b, P] times `right` [a, P] transposed to `total` [e, b, a] fp32."""
    size = left.data.shape[1]
    _add(total, left.data, right.data, (left.scale, right.scale), ends, (size, 1, size, 1))


def _add(
    total: Tensor,
    left: Tensor,
    right: Tensor,
    scales: tuple[Tensor, Tensor] | None,
    ends: Tensor,
    strides: tuple[int, int, int, int],
) -> None:
    num_experts, b, a = total.shape
    if total.numel() and left.numel():
        narrow = scales is not None
        num_rows = left.shape[1 if narrow else 0]
        large = num_rows >= MANY_ROWS * num_experts
        tile_b, tile_a, depth = 128, 256 if large else 128, 128 if narrow and large else 64
        tiles = triton.cdiv(b, tile_b) * triton.cdiv(a, tile_a)
        _wgrad_kernel[(tiles, num_experts)](
            *(left, right, *(scales or (total, total)), ends, total, num_experts),
            *(b, a, *strides),
            SCALED=scales is not None,
            TILE_B=tile_b,
            TILE_A=tile_a,
            DEPTH=depth,
            BAND=BAND,
            num_warps=8 if large else 4,
            num_stages=4 if large else 3,
        )
