"""Rounding to e4m3 with one scale per row, in plain torch: the twins of `kernels.quantize`."""

import torch
from torch import Tensor

from ep_plugin.moe.e4m3 import E4M3, Rows8

LARGEST = 448.0  # value of e4m3
SMALLEST = 2.0**-126  # scale


def power_of_two_scale(largest: Tensor) -> Tensor:
    """Return the smallest power of two s with largest / s <= 448, 2^-126 or larger.

    For 0 it is 2^-126. So a row of zeros never decides the largest scale of several rows.
    """
    mantissa, exponent = torch.frexp(largest.float() / LARGEST)  # in [0.5, 1) * 2^exponent
    exponent = exponent - (mantissa == 0.5).int()
    scale = torch.ldexp(torch.ones_like(mantissa), exponent.clamp(-126, 127))
    return torch.where(largest > 0, scale, SMALLEST)


def quantize_rows(matrix: Tensor) -> Rows8:
    """Return `matrix` [R, X] in e4m3; each row has its own scale."""
    wide = matrix.float()
    largest = wide.abs().amax(dim=1) if matrix.shape[1] else wide.new_zeros(len(wide))
    scale = power_of_two_scale(largest)
    return Rows8((wide / scale.unsqueeze(1)).to(E4M3), scale)


def dequantize_rows(rows: Rows8) -> Tensor:
    """Return the values [R, X] in fp32."""
    return rows.data.float() * rows.scale.unsqueeze(1)
