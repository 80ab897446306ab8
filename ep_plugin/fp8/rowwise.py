"""FP8 products with one scale per row: e4m3 in, bf16 out.

Operands have powers of two as scales (see `ep_plugin.e4m3`): activations, gradients and weights one
per row in forward; transposed weights, and both sides of a weight gradient, one per expert.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ep_plugin.contracts import GroupedGemm
from ep_plugin.e4m3 import Columns8, Rows8, Weight8
from ep_plugin.fp8._check import check_recipe
from ep_plugin.kernels import Rows, select
from ep_plugin.records import joined

MULTIPLE = 16  # of every dimension: rows start at addresses that are multiples of 16 bytes


@dataclass(frozen=True)
class Weights:
    """Both weights in e4m3, in the layouts of forward and of data gradient."""

    fc1: Weight8  # [e, 2F or F, H]
    fc1_transposed: Weight8  # [e, H, 2F or F]
    fc2: Weight8  # [e, H, F]
    fc2_transposed: Weight8  # [e, F, H]


def check(hidden_size: int, ffn_hidden_size: int, device: torch.device) -> None:
    """Raise ConfigError when this recipe has no product for the sizes or the device."""
    check_recipe("rowwise", MULTIPLE, hidden_size, ffn_hidden_size, device)


def prepare(fc1: Tensor, fc2: Tensor) -> Weights:
    """Return both weights [e, out, in] in e4m3; once per optimizer step is enough."""
    ops = select(fc1)
    return Weights(*ops.quantize_weight(fc1), *ops.quantize_weight(fc2))


class Rowwise:
    """The `Recipe` of `fused_experts`; weight gradients in bf16 keep the tokens in bf16."""

    has_own_products = True  # but for weight gradients in bf16
    takes_pieces = False

    def __init__(self, rows: Rows, gemm: GroupedGemm, weights: Weights, wgrad8: bool) -> None:
        self.rows, self.gemm, self.weights, self.wgrad8 = rows, gemm, weights, wgrad8

    def keep(self, tokens: Tensor) -> Any:
        return self._quantize(tokens) if self.wgrad8 else tokens.bfloat16()

    def first(self, kept: Any, fc1: Tensor) -> Tensor:
        kept = kept if self.wgrad8 else self._quantize(kept)
        return self._multiply(self._spread(kept), self.weights.fc1)

    def second(self, hidden: Tensor, probs: Tensor, fc2: Tensor) -> Tensor:
        active = self.rows.activate(hidden, probs, fp8=True)
        return self.rows.sum(self._multiply(active, self.weights.fc2))

    def narrow(self, hidden: Tensor) -> Rows8:
        return self._quantize(hidden)

    def incoming(self, grads: Tensor) -> Any:
        return self._quantize(grads) if self.wgrad8 else grads

    def all_incoming(self, grads: list[Tensor], pieces: list[Any]) -> Any:
        return joined(pieces)

    def hidden_grads(
        self, incoming: Any, hidden: Any, probs: Tensor, fc2: Tensor
    ) -> tuple[Any, Any, Tensor]:
        incoming = incoming if self.wgrad8 else self._quantize(incoming)
        d_active = self._multiply(self._spread(incoming), self.weights.fc2_transposed)
        return self.rows.activate_backward(d_active, hidden, probs, self.wgrad8)

    def fc2_grads(self, incoming: Any, active: Any, into: Tensor | None) -> Tensor | None:
        if not self.wgrad8:
            grads = self.rows.spread(incoming.bfloat16())
            return self.rows.wgrad(self.gemm, grads, active, into)
        return self._wgrad8(self._columns(incoming, True), self._columns(active, False), into)

    def token_grads(self, d_hidden: Any, fc1: Tensor) -> Tensor:
        narrow = d_hidden if self.wgrad8 else self._quantize(d_hidden)
        return self.rows.sum(self._multiply(narrow, self.weights.fc1_transposed))

    def fc1_grads(self, d_hidden: Any, kept: Any, into: Tensor | None) -> Tensor | None:
        if not self.wgrad8:
            return self.rows.wgrad(self.gemm, d_hidden, self.rows.spread(kept), into)
        return self._wgrad8(self._columns(d_hidden, False), self._columns(kept, True), into)

    def _multiply(self, rows: Rows8, weight: Weight8) -> Tensor:
        product: Tensor = self.rows.ops.multiply(rows, weight, self.rows.ends, self.rows.tiles)
        return product

    def _wgrad8(self, grads: Columns8, rows: Columns8, into: Tensor | None) -> Tensor | None:
        if into is None:
            gradient: Tensor = self.rows.ops.multiply_columns(grads, rows, self.rows.tiles)
            return gradient
        self.rows.ops.add_wgrad8(into, grads, rows, self.rows.tiles)
        return None

    def _quantize(self, matrix: Tensor) -> Rows8:
        quantized: Rows8 = self.rows.ops.quantize_rows(matrix)
        return quantized

    def _spread(self, tokens: Rows8) -> Rows8:
        rows = self.rows
        spread: Rows8 = rows.ops.spread_rows8(tokens, rows.place, rows.ends, len(rows.order))
        return spread

    def _columns(self, matrix: Rows8, are_tokens: bool) -> Columns8:
        """Return an operand of a weight gradient, from rows or from tokens."""
        rows, choices = self.rows, self.rows.place.shape[1] if are_tokens else 0
        planned = rows.tiles, rows.order, rows.ends
        columns: Columns8 = rows.ops.transpose_rows(matrix, *planned, choices)
        return columns
