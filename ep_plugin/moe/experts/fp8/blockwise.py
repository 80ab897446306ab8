"""FP8 products with block scales: e4m3 in, bf16 out.

This is the recipe of DeepSeek-V3 (arXiv:2412.19437, section 3.3.2) with powers of two as scales:

- tokens, activations, gradients in forward and data gradient: one scale per row and 128 features
- weights: one scale per 128 x 128
- both operands of weight gradients: one scale per 128 rows of an expert and 128 features

For the last, DeepSeek-V3 has one scale per 128 rows and single feature. With powers of two, scales
only decide which values fall below the smallest normal number. So the bytes of the forward can be
read again and need no second rounding.

Sizes that are no multiples of 128 are padded with zeros in e4m3, and the pre-activations [R, F or
2F] with them, gate and up apart. Zeros stay zeros through every activation, forward and backward.
"""

from dataclasses import replace

import torch
from torch import Tensor

from ep_plugin.moe.e4m3 import Blocks8, ColumnBlocks8, WeightBlocks8
from ep_plugin.moe.experts.fp8._check import check_device
from ep_plugin.moe.experts.fp8._recipe import Fp8, Size, Weights, sizes
from ep_plugin.moe.kernels import select


def check(hidden_size: int, ffn_hidden_size: int, device: torch.device) -> None:
    """Raise ConfigError if this recipe cannot compute on this device; it takes every size."""
    check_device("blockwise", device)


def prepare(fc1: Tensor, fc2: Tensor) -> Weights:
    """Return both weights [e, out, in] in e4m3; needed again only after an optimizer step."""
    first, second = sizes(fc1, fc2)
    straight1, turned1 = select(fc1).quantize_weight_blocks(fc1, first.parts)
    straight2, turned2 = select(fc2).quantize_weight_blocks(fc2)
    turned1, straight2 = (replace(w, width=first.inputs) for w in (turned1, straight2))
    return Weights(straight1, turned1, straight2, turned2, first, second)


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
        self, grads: ColumnBlocks8, rows: ColumnBlocks8, size: Size, into: Tensor | None
    ) -> Tensor | None:
        ops, tiles = self.rows.ops, self.rows.tiles
        if into is None:
            gradient: Tensor = ops.multiply_column_blocks(grads, rows, tiles, size[:2], size.parts)
            return gradient
        ops.add_wgrad_blocks(into, grads, rows, tiles, size.parts)
        return None

    def _unpadded(self, matrix: Tensor, parts: int) -> Tensor:
        ffn = self.weights.second.inputs
        if matrix.shape[1] == parts * ffn:
            return matrix
        return matrix.view(len(matrix), parts, matrix.shape[1] // parts)[:, :, :ffn].flatten(1)
