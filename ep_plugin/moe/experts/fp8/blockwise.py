"""FP8 products with block scales: e4m3 in, bf16 out.

This is the recipe of DeepSeek-V3 (arXiv:2412.19437, section 3.3.2) with powers of two as scales:

- tokens, activations, gradients in forward and data gradient: one scale per row and 128 features
- weights: one scale per 128 x 128
- both operands of weight gradients: one scale per 128 rows of an expert and 128 features

For the last, DeepSeek-V3 has one scale per 128 rows and single feature. With powers of two, scales
only decide which values fall below the smallest normal number. So the bytes of the forward can be
read again and need no second rounding.
"""

import torch
from torch import Tensor

from ep_plugin.moe.e4m3 import BLOCK, Blocks8, ColumnBlocks8, WeightBlocks8
from ep_plugin.moe.experts.fp8._check import check_recipe
from ep_plugin.moe.experts.fp8._recipe import Fp8, Weights
from ep_plugin.moe.kernels import select


def check(hidden_size: int, ffn_hidden_size: int, device: torch.device) -> None:
    """Raise ConfigError if this recipe cannot compute these sizes or on this device."""
    check_recipe("blockwise", BLOCK, hidden_size, ffn_hidden_size, device)


def prepare(fc1: Tensor, fc2: Tensor) -> Weights:
    """Return both weights [e, out, in] in e4m3; needed again only after an optimizer step."""
    ops = select(fc1)
    return Weights(*ops.quantize_weight_blocks(fc1), *ops.quantize_weight_blocks(fc2))


class Blockwise(Fp8):
    """The recipe with block scales."""

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
