"""FP8 with one scale for each 128 values that a product sums over, weights for each 128 x 128.

The recipe of DeepSeek-V3 (arXiv:2412.19437, section 3.3.2), with powers of two as scales: tokens,
activations and gradients along features in forward and data gradient, along an expert's rows in
weight gradients. A rounded value is exact in bf16 then, so the products are bf16 products of
rounded operands: FP8's numbers and memory at the speed of bf16, whatever grouped GEMM is installed.
What is kept in e4m3 along features is rounded once more along rows; powers of two differ by whole
exponents, so this changes only values below the smallest normal number of their new block.

The activation is rounded where it is computed, tokens where they move to rows. The results of its
backward are read once more, since 128 rows share a scale there: gradients for both products they
are in at once. Weight gradients in bf16 want tokens that were not rounded, so those are kept as
they came: twice the bytes of e4m3, but no copy where they are bf16 already.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ep_plugin.contracts import GroupedGemm
from ep_plugin.e4m3 import BLOCK, Blocks8
from ep_plugin.fp8._check import check_recipe
from ep_plugin.kernels import Rows, select
from ep_plugin.records import joined


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
    """The `Recipe` of `fused_experts`; `wgrad8` says whether weight gradients are in FP8."""

    has_own_products = False  # all are those of the grouped GEMM
    takes_pieces = False

    def __init__(self, rows: Rows, gemm: GroupedGemm, weights: Weights, wgrad8: bool) -> None:
        self.rows, self.gemm, self.weights, self.wgrad8 = rows, gemm, weights, wgrad8

    def keep(self, tokens: Tensor) -> Any:
        return self.rows.ops.quantize_blocks(tokens) if self.wgrad8 else tokens.bfloat16()

    def first(self, kept: Any, fc1: Tensor) -> Tensor:
        return self.gemm.forward(self._spread(kept), self.weights.fc1, self.rows.ends)

    def second(self, hidden: Tensor, probs: Tensor, fc2: Tensor) -> Tensor:
        active = self.rows.activate(hidden, probs, blocks=True)
        return self.rows.sum(self.gemm.forward(active, self.weights.fc2, self.rows.ends))

    def narrow(self, hidden: Tensor) -> Blocks8:
        blocks: Blocks8 = self.rows.ops.quantize_blocks(hidden)
        return blocks

    def incoming(self, grads: Tensor) -> Tensor:
        return grads

    def all_incoming(self, grads: list[Tensor], pieces: list[Any]) -> Any:
        return joined(pieces)

    def hidden_grads(
        self, incoming: Tensor, hidden: Any, probs: Tensor, fc2: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        d_active = self.gemm.dgrad(self._spread(incoming), self.weights.fc2, self.rows.ends)
        return self.rows.activate_backward(d_active, hidden, probs)

    def fc2_grads(self, incoming: Tensor, active: Tensor, into: Tensor | None) -> Tensor | None:
        operands = self._tokens(incoming), self._columns(active, 0)
        return self.rows.wgrad(self.gemm, *operands, into)

    def token_grads(self, d_hidden: Tensor, fc1: Tensor) -> Tensor:
        rounded = self.rows.ops.round_rows(d_hidden, self.rows.ends)
        return self.rows.sum(self.gemm.dgrad(rounded, self.weights.fc1, self.rows.ends))

    def fc1_grads(self, d_hidden: Tensor, kept: Any, into: Tensor | None) -> Tensor | None:
        operands = self._columns(d_hidden, 0), self._tokens(kept)
        return self.rows.wgrad(self.gemm, *operands, into)

    def _spread(self, tokens: Any) -> Tensor:
        """Return the token of each row, of `tokens` [N, H], rounded along features."""
        rows = self.rows
        spread: Tensor = rows.ops.spread_blocks(tokens, rows.place, rows.ends, len(rows.order))
        return spread

    def _tokens(self, tokens: Any) -> Tensor:
        """Return the token of each row as an operand of a weight gradient."""
        if not self.wgrad8:
            return self.rows.spread(tokens.bfloat16())
        return self._columns(tokens, self.rows.place.shape[1])

    def _columns(self, source: Any, choices: int) -> Tensor:
        """Return rows [R, X], or those of tokens, rounded along rows where `wgrad8` says so."""
        rows = self.rows
        operand: Tensor = source
        if self.wgrad8:
            operand = rows.ops.round_columns(source, rows.tiles, rows.order, rows.ends, choices)
        return operand
