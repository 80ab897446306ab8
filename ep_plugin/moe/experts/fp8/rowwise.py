"""FP8 products with one scale per row: e4m3 in, bf16 out.

Scales are powers of two (see `moe/e4m3.py`). Tokens, activations, gradients, and weights in the
forward have one per row. Transposed weights, and both operands of a weight gradient, have one per
expert.
"""

import torch
from torch import Tensor

from ep_plugin.moe.e4m3 import Columns8, Rows8, Weight8
from ep_plugin.moe.experts.fp8._check import check_recipe
from ep_plugin.moe.experts.fp8._recipe import Fp8, Size, Weights, sizes
from ep_plugin.moe.kernels import select

MULTIPLE = 16  # of every dimension, so that rows start at multiples of 16 bytes


def check(hidden_size: int, ffn_hidden_size: int, device: torch.device) -> None:
    """Raise ConfigError if this recipe cannot compute these sizes or on this device."""
    check_recipe("rowwise", MULTIPLE, hidden_size, ffn_hidden_size, device)


def prepare(fc1: Tensor, fc2: Tensor) -> Weights:
    """Return both weights [e, out, in] in e4m3; needed again only after an optimizer step."""
    ops = select(fc1)
    (straight1, turned1), (straight2, turned2) = map(ops.quantize_weight, (fc1, fc2))
    return Weights(straight1, turned1, straight2, turned2, *sizes(fc1, fc2))


class Rowwise(Fp8):
    """The recipe with one scale per row."""

    scales = "rows"

    def _quantize(self, matrix: Tensor) -> Rows8:
        quantized: Rows8 = self.rows.ops.quantize_rows(matrix)
        return quantized

    def _multiply(self, rows: Rows8, weight: Weight8) -> Tensor:
        product: Tensor = self.rows.ops.multiply(rows, weight, self.rows.ends, self.rows.tiles)
        return product

    def _transpose(self, rows: Rows8, choices: int) -> Columns8:
        planned = self.rows.tiles, self.rows.order, self.rows.ends
        columns: Columns8 = self.rows.ops.transpose_rows(rows, *planned, choices)
        return columns

    def _wgrad8(
        self, grads: Columns8, rows: Columns8, size: Size, into: Tensor | None
    ) -> Tensor | None:
        if into is None:
            gradient: Tensor = self.rows.ops.multiply_columns(grads, rows, self.rows.tiles)
            return gradient
        self.rows.ops.add_wgrad8(into, grads, rows, self.rows.tiles)
        return None
