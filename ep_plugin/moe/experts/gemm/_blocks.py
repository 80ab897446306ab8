"""Padding: rows are moved so that every expert's rows begin at a multiple of BLOCK.

No host syncs.
"""

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 128


class Places(NamedTuple):
    """Where each row lies after every expert's block of rows has been padded."""

    row: Tensor  # [R] int64, the padded index of each row; no two are equal
    ends: Tensor  # [e] int32, the padded index after each expert's last row
    size: int  # number of padded rows, for the worst case of row counts


def place_rows(ends: Tensor, num_rows: int) -> Places:
    """Return the places of `num_rows` rows; each expert's block ends at `ends` [e] int32.

    Padding moves no row by more than e * (BLOCK - 1). Rows past the last block move by exactly
    that, so they stay past it.
    """
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    padded = (ends - starts + BLOCK - 1) // BLOCK * BLOCK  # [e]
    shift = padded.cumsum(0, dtype=torch.int32) - padded - starts  # [e]
    most = len(ends) * (BLOCK - 1)
    rows = torch.arange(num_rows, device=ends.device)
    expert = torch.searchsorted(ends, rows, right=True)  # [R], e behind the last block
    shifts = torch.cat([shift, shift.new_full((1,), most)])
    return Places(rows + shifts[expert], ends + shift, num_rows + most)


def spread(rows: Tensor, places: Places, fill: float | None = None) -> Tensor:
    """Return `rows` [R, a] at their places [size, a]; padding is `fill`, arbitrary if None."""
    shape = (places.size, rows.shape[1])
    padded = rows.new_empty(shape) if fill is None else rows.new_full(shape, fill)
    return padded.index_copy_(0, places.row, rows)
