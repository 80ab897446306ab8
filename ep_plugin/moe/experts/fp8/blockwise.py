"""FP8 products with one scale for each 128 values of a sum, weights for each 128 x 128: bf16 out.

The recipe of DeepSeek-V3 (arXiv:2412.19437, section 3.3.2), with powers of two as scales. Tokens,
activations and gradients have one for each 128 features in forward and data gradient. Operands of
weight gradients have one for 128 rows of an expert and 128 features, where that recipe has one for
128 rows and each feature: a power of two decides only which values are below the smallest normal
number, so the bytes of the forward can be read again and need not be rounded anew.
"""

import torch
from torch import Tensor

from ep_plugin.moe.e4m3 import BLOCK, Blocks8, ColumnBlocks8, WeightBlocks8
from ep_plugin.moe.experts.fp8._check import check_recipe
from ep_plugin.moe.experts.fp8._recipe import Fp8, Weights
from ep_plugin.moe.kernels import select


def check(hidden_size: int, ffn_hidden_size: int, device: torch.device) -> None:
    """Raise ConfigError when this recipe has no product for the sizes or the device."""
    check_recipe("blockwise", BLOCK, hidden_size, ffn_hidden_size, device)


def prepare(fc1: Tensor, fc2: Tensor) -> Weights:
    """Return both weights [e, out, in] in e4m3; once per optimizer step is enough."""
    ops = select(fc1)
    return Weights(*ops.quantize_weight_blocks(fc1), *ops.quantize_weight_blocks(fc2))


class Blockwise(Fp8):
    """The kernels of this recipe."""

    scales = "blocks"

    def _quantize(self, matrix: Tensor) -> Blocks8:
        quantized: Blocks8 = self.rows.ops.quantize_blocks(matrix)
        return quantized

    def _multiply(self, rows: Blocks8, weight: WeightBlocks8) -> Tensor:
        ops, ends, tiles = self.rows.ops, self.rows.ends, self.rows.tiles
        product: Tensor = ops.multiply_blocks(rows, weight, ends, tiles)
        return product

    def _transpose(self, rows: Blocks8, choices: int) -> ColumnBlocks8:
        planned = self.rows.tiles, self.rows.order, self.rows.ends
        columns: ColumnBlocks8 = self.rows.ops.transpose_blocks(rows, *planned, choices)
        return columns

    def _wgrad8(
        self, grads: ColumnBlocks8, rows: ColumnBlocks8, into: Tensor | None
    ) -> Tensor | None:
        if into is None:
            gradient: Tensor = self.rows.ops.multiply_column_blocks(grads, rows, self.rows.tiles)
            return gradient
        self.rows.ops.add_wgrad_blocks(into, grads, rows, self.rows.tiles)
        return None
