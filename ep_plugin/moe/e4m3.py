"""FP8 by rows and by blocks: e4m3 values with powers of two as scales.

By rows there is one scale for each row. A row's scale is the smallest power of two that brings its
largest value to at most 448, the largest e4m3 number. Powers of two cost no precision (they move
the exponent), and they let the same bytes serve both products that read a tensor: along the row in
forward and data gradient, and along the column, over all rows of an expert, in the weight gradient.
There every row is moved to the largest scale among its expert's rows, which only shifts exponents:
nothing is rounded twice, but for values that fall below the smallest normal number.

By blocks there is one for each 128 values that a product sums over, and weights have one for each
128 x 128. Rows that are to be read along columns are moved to the largest scale of 128 rows and 128
columns, so those are blocks like a weight's, and again nothing is rounded twice but for values
below the smallest normal number. A size that is no multiple of 128 is padded with zeros in e4m3: X
below is then the next multiple.
"""

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
BLOCK = 128  # values that share a scale, by blocks


def whole_blocks(size: int) -> int:
    """Return `size` padded to a multiple of 128."""
    return -(-size // BLOCK) * BLOCK


@dataclass(frozen=True)
class Rows8:
    """A matrix in e4m3: value = data * scale of its row."""

    data: Tensor  # [R, X] e4m3
    scale: Tensor  # [R] fp32, powers of two


@dataclass(frozen=True)
class Weight8:
    """A matrix for each expert in e4m3: value = data * scale of its row."""

    data: Tensor  # [e, b, a] e4m3
    scale: Tensor  # [e, b] fp32, powers of two


@dataclass(frozen=True)
class Columns8:
    """Rows of all experts, transposed, in e4m3: value = data * scale of the column's expert.

    Each expert's columns are padded with zeros to a multiple of 128; see `kernels.types.Tiles`.
    """

    data: Tensor  # [X, P] e4m3
    scale: Tensor  # [e] fp32, powers of two


@dataclass(frozen=True)
class Blocks8:
    """A matrix in e4m3: value = data * scale of its 128 columns."""

    data: Tensor  # [R, X] e4m3
    scale: Tensor  # [R, X / 128] fp32, powers of two


Values8 = TypeVar("Values8", Rows8, Blocks8)


@dataclass(frozen=True)
class WeightBlocks8:
    """A matrix for each expert in e4m3: value = data * scale of its 128 x 128 values."""

    data: Tensor  # [e, b, a] e4m3
    scale: Tensor  # [e, b / 128, a / 128] fp32, powers of two
    width: int  # of a product: b, or less, where what is padding shall not be written


@dataclass(frozen=True)
class ColumnBlocks8:
    """Rows of all experts, transposed, in e4m3: value = data * scale of its 128 x 128 values.

    Columns are padded as those of `Columns8`.
    """

    data: Tensor  # [X, P] e4m3
    scale: Tensor  # [P / 128, X / 128] fp32, powers of two
