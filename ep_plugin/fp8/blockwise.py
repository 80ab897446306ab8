"""FP8 with one scale for each 128 values that a product sums over, weights for each 128 x 128.

The recipe of DeepSeek-V3 (arXiv:2412.19437, section 3.3.2), with powers of two as scales: tokens,
activations and gradients along features in forward and data gradient, along an expert's rows in
weight gradients. A rounded value is exact in bf16 then, so the products are bf16 products of
rounded operands: FP8's numbers and memory at the speed of bf16, whatever grouped GEMM is installed.
What is kept in e4m3 along features is rounded once more along rows; powers of two differ by whole
exponents, so this changes only values below the smallest normal number of their new block.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ep_plugin.contracts import GroupedGemm
from ep_plugin.e4m3 import BLOCK, Blocks8
from ep_plugin.fp8._check import check_recipe
from ep_plugin.kernels import Rows, select


@dataclass(frozen=True)
class Weights:
    """Both weights in bf16, rounded; one layout serves forward and data gradient."""

    fc1: Tensor  # [e, 2F or F, H]
    fc2: Tensor  # [e, H, F]


def check(hidden_size: int, ffn_hidden_size: int, device: torch.device) -> None:
    """Raise ConfigError when this recipe has no product for the sizes or the device."""
    check_recipe("blockwise", BLOCK, hidden_size, ffn_hidden_size, device)


def prepare(fc1: Tensor, fc2: Tensor) -> Weights:
    """Return both weights [e, out, in] rounded; once per optimizer step is enough."""
    ops = select(fc1)
    return Weights(ops.round_weight(fc1), ops.round_weight(fc2))


class Blockwise:
    """The `Recipe` of `fused_experts`; weight gradients in bf16 keep the tokens in bf16."""

    has_own_products = False  # all are those of the grouped GEMM

    def __init__(self, rows: Rows, gemm: GroupedGemm, weights: Weights, wgrad8: bool) -> None:
        self.rows, self.gemm, self.weights, self.wgrad8 = rows, gemm, weights, wgrad8

    def keep(self, tokens: Tensor) -> Any:
        return self.rows.ops.quantize_blocks(tokens) if self.wgrad8 else tokens.bfloat16()

    def first(self, kept: Any, fc1: Tensor) -> Tensor:
        rows = self.rows.spread(self._rounded(kept))
        return self.gemm.forward(rows, self.weights.fc1, self.rows.ends)

    def second(self, hidden: Tensor, probs: Tensor, fc2: Tensor) -> Tensor:
        active = self._round_rows(self.rows.activate(hidden, probs))
        return self.rows.sum(self.gemm.forward(active, self.weights.fc2, self.rows.ends))

    def narrow(self, hidden: Tensor) -> Blocks8:
        blocks: Blocks8 = self.rows.ops.quantize_blocks(hidden)
        return blocks

    def backward(
        self, grads: Tensor, kept: Any, hidden: Any, probs: Tensor, fc1: Tensor, fc2: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows, gemm, ends = self.rows, self.gemm, self.rows.ends
        if isinstance(hidden, Blocks8):
            hidden = rows.ops.dequantize_blocks(hidden)
        d_active = gemm.dgrad(rows.spread(self._rounded(grads)), self.weights.fc2, ends)
        d_hidden, active, d_probs = rows.activate_backward(d_active, hidden, probs)
        del d_active
        d_tokens = rows.sum(gemm.dgrad(self._round_rows(d_hidden), self.weights.fc1, ends))
        d_fc2 = gemm.wgrad(self._for_wgrad(rows.spread(grads)), self._for_wgrad(active), ends)
        del active
        tokens = rows.ops.dequantize_blocks(kept) if self.wgrad8 else kept
        d_fc1 = gemm.wgrad(self._for_wgrad(d_hidden), self._for_wgrad(rows.spread(tokens)), ends)
        return d_tokens, d_probs, d_fc1, d_fc2

    def _rounded(self, tokens: Any) -> Tensor:
        """Return `tokens` [N, H] rounded along features, in bf16."""
        ops = self.rows.ops
        blocks = tokens if isinstance(tokens, Blocks8) else ops.quantize_blocks(tokens)
        rounded: Tensor = ops.dequantize_blocks(blocks)
        return rounded

    def _round_rows(self, matrix: Tensor) -> Tensor:
        rounded: Tensor = self.rows.ops.round_rows(matrix, self.rows.ends)
        return rounded

    def _for_wgrad(self, matrix: Tensor) -> Tensor:
        """Return rows [R, X] rounded along rows, where weight gradients are in FP8."""
        if not self.wgrad8:
            return matrix.bfloat16()
        rounded: Tensor = self.rows.ops.round_columns(matrix, self.rows.ends)
        return rounded
