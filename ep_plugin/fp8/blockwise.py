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

    def incoming(self, grads: Tensor) -> Tensor:
        return grads

    def hidden_grads(
        self, incoming: Tensor, hidden: Any, probs: Tensor, fc2: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        if isinstance(hidden, Blocks8):
            hidden = self.rows.ops.dequantize_blocks(hidden)
        grads = self.rows.spread(self._rounded(incoming))
        d_active = self.gemm.dgrad(grads, self.weights.fc2, self.rows.ends)
        return self.rows.activate_backward(d_active, hidden, probs)

    def fc2_grads(self, incoming: Tensor, active: Tensor) -> Tensor:
        grads = self._for_wgrad(self.rows.spread(incoming))
        return self.gemm.wgrad(grads, self._for_wgrad(active), self.rows.ends)

    def token_grads(self, d_hidden: Tensor, fc1: Tensor) -> Tensor:
        rounded = self._round_rows(d_hidden)
        return self.rows.sum(self.gemm.dgrad(rounded, self.weights.fc1, self.rows.ends))

    def fc1_grads(self, d_hidden: Tensor, kept: Any) -> Tensor:
        tokens = self._for_wgrad(self.rows.spread(self._plain(kept)))
        return self.gemm.wgrad(self._for_wgrad(d_hidden), tokens, self.rows.ends)

    def _plain(self, kept: Any) -> Tensor:
        tokens: Tensor = self.rows.ops.dequantize_blocks(kept) if self.wgrad8 else kept
        return tokens

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
