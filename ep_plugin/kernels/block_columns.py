"""Rounding to e4m3 by 128 rows of an expert, as weight gradients want; twins in `blocks_torch`.

One program handles one block: a tile of an expert's rows, some features. Rows behind the last
expert's are not touched.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ep_plugin.e4m3 import Blocks8
from ep_plugin.kernels import TILE, Tiles
from ep_plugin.kernels._launch import jit
from ep_plugin.kernels.quantize import power_of_two_scale

FEATURES = 64  # of a tile of round_columns


@triton.jit
def _round(values, AXIS: tl.constexpr):
    """Values rounded to e4m3, those along AXIS with one scale."""
    scale = tl.expand_dims(power_of_two_scale(tl.max(tl.abs(values), axis=AXIS)), AXIS)
    return ((values / scale).to(tl.float8e4nv).to(tl.float32) * scale).to(tl.bfloat16)


@jit
def _columns_kernel(
    source, scales, order, ends, expert_of, row_of, out, choices, WIDTH,
    TOKENS: tl.constexpr, SCALED: tl.constexpr, SIZE: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    expert = tl.load(expert_of + tl.program_id(0))
    if expert < 0:
        return
    last = tl.load(ends + expert)
    row = tl.load(row_of + tl.program_id(0)) + tl.arange(0, SIZE)
    origin = row
    if TOKENS:
        origin = tl.load(order + row, mask=row < last, other=0) // choices
    origin = origin.to(tl.int64)[:, None]
    feature = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)[None, :]
    there = (row < last)[:, None] & (feature < WIDTH)
    values = tl.load(source + origin * WIDTH + feature, mask=there, other=0.0).to(tl.float32)
    if SCALED:
        cell = origin * (WIDTH // SIZE) + tl.program_id(1) * FEATURES // SIZE  # FEATURES <= SIZE
        values *= tl.load(scales + cell, mask=(row < last)[:, None], other=0.0)
    target = out + row.to(tl.int64)[:, None] * WIDTH + feature
    tl.store(target, _round(values, 0), mask=there)


def round_columns(
    source: Tensor | Blocks8, tiles: Tiles, order: Tensor, ends: Tensor, choices: int = 0
) -> Tensor:
    """Return rows [R, X] rounded to e4m3, each tile of an expert's rows with its scales: bf16.

    `choices` 0 says that `source` are the rows; else they are tokens with so many choices each,
    and `order` [R] says which choice a row is of.
    """
    data, scale = (source, None) if isinstance(source, Tensor) else (source.data, source.scale)
    num_rows, width = len(order), data.shape[1]
    out = torch.empty(num_rows, width, dtype=torch.bfloat16, device=data.device)
    if out.numel():
        _columns_kernel[(len(tiles.expert), triton.cdiv(width, FEATURES))](
            *(data, ends if scale is None else scale, order, ends, tiles.expert, tiles.row, out),
            *(choices, width),
            TOKENS=choices > 0,
            SCALED=scale is not None,
            SIZE=TILE,
            FEATURES=FEATURES,
            num_warps=8,
        )
    return out
