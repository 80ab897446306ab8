"""Memory-bound steps of the experts in Triton: each reads and writes every byte once.

The functions have the same names, arguments and results as their twins in `experts_torch`.
"""

from ep_plugin.kernels.activation import ACTIVATIONS, activate, activate_backward
from ep_plugin.kernels.block_columns import round_columns
from ep_plugin.kernels.blocks import quantize_blocks, round_rows, round_weight, spread_blocks
from ep_plugin.kernels.quantize import (
    pad_columns,
    quantize_rows,
    quantize_weight,
    transpose_rows,
)
from ep_plugin.kernels.rows import (
    sort_choices,
    spread_rows,
    spread_rows8,
    sum_pieces,
    sum_rows,
)
from ep_plugin.kernels.wgrad import add_wgrad, add_wgrad8

__all__ = [
    "ACTIVATIONS",
    "activate",
    "activate_backward",
    "add_wgrad",
    "add_wgrad8",
    "pad_columns",
    "quantize_blocks",
    "quantize_rows",
    "quantize_weight",
    "round_columns",
    "round_rows",
    "round_weight",
    "sort_choices",
    "spread_blocks",
    "spread_rows",
    "spread_rows8",
    "sum_pieces",
    "sum_rows",
    "transpose_rows",
]
