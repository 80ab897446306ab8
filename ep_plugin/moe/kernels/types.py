"""What the kernels and their callers both speak of: tiles of rows, targets, kinds of scales."""

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from ep_plugin.moe.e4m3 import BLOCK

TILE = BLOCK  # rows; in weight gradients by blocks they share scales
Scales = Literal["rows", "blocks"]  # e4m3 with one scale for each row, or each 128 columns of it


@dataclass(frozen=True)
class Tiles:
    """Each expert's rows in tiles of 128, the last of an expert shorter."""

    expert: Tensor  # [n] int32, whose rows; -1 behind the last tile
    row: Tensor  # [n] int32, the first of them
    ends: Tensor  # [e] int32, the tile behind each expert's last


@dataclass(frozen=True)
class Target:
    """Larger matrices that some rows are part of."""

    at: Tensor  # [R] int32, the row there of each row
    num_rows: int  # there
    matrices: Any = None  # None before the first rows are written
