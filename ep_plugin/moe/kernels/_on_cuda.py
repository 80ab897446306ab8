"""Steps of the experts in Triton: e4m3 products, and the memory-bound work around products.

The functions have the same names, arguments and results as their twins in `_on_any`.
"""

from ep_plugin.moe.kernels.activation import ACTIVATIONS, activate, activate_backward
from ep_plugin.moe.kernels.block_product import (
    add_wgrad_blocks,
    multiply_blocks,
    multiply_column_blocks,
)
from ep_plugin.moe.kernels.blocks import quantize_blocks, quantize_weight_blocks
from ep_plugin.moe.kernels.move_rows import (
    count_choices,
    sort_choices,
    spread_rows,
    spread_rows8,
    sum_pieces,
    sum_rows,
)
from ep_plugin.moe.kernels.product import multiply
from ep_plugin.moe.kernels.quantize import (
    quantize_rows,
    quantize_weight,
    transpose_blocks,
    transpose_rows,
)
from ep_plugin.moe.kernels.sends import count_sends, place_sends, take_own, zero_absent
from ep_plugin.moe.kernels.tiles import plan_tiles
from ep_plugin.moe.kernels.wgrad import add_wgrad, add_wgrad8, multiply_columns

__all__ = [
    "ACTIVATIONS",
    "activate",
    "activate_backward",
    "add_wgrad",
    "add_wgrad8",
    "add_wgrad_blocks",
    "count_choices",
    "count_sends",
    "multiply",
    "multiply_blocks",
    "multiply_column_blocks",
    "multiply_columns",
    "place_sends",
    "plan_tiles",
    "quantize_blocks",
    "quantize_rows",
    "quantize_weight",
    "quantize_weight_blocks",
    "sort_choices",
    "spread_rows",
    "spread_rows8",
    "sum_pieces",
    "sum_rows",
    "take_own",
    "transpose_blocks",
    "transpose_rows",
    "zero_absent",
]
