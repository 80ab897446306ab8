"""Types that kernels and their callers share: tiles of rows, targets, kinds of scales."""

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from ep_plugin.moe.e4m3 import BLOCK

TILE = BLOCK  # rows; with block scales those of a tile share a scale in weight gradients
Scales = Literal["rows", "blocks"]  # e4m3 with one scale per row, or per 128 columns of a row


@dataclass(frozen=True)
class Tiles:
    """Each expert's rows in tiles of 128 or 64; the last tile of an expert may be shorter."""

    expert: Tensor  # [n] int32, the expert whose rows they are; -1 after the last tile
    row: Tensor  # [n] int32, the first row of each tile; -1 after the last tile
    ends: Tensor  # [e] int32, the tile after each expert's last


@dataclass(frozen=True)
class Target:
    """Larger matrices, and the rows of them that a call writes."""

    at: Tensor  # [R] int32, the row of the larger matrices that each row goes to
    num_rows: int  # of the larger matrices
    matrices: Any = None  # None before the first call, which makes them
