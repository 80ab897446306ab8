"""What FP8 recipes have in common: which tensors are in e4m3, and where each is rounded.

Tokens and gradients of the output are rounded when they arrive. The activation and the gradients of
the pre-activations are rounded in the kernels that compute them. Each tensor is rounded once, with
scales along its features. FP8 weight gradients read the same bytes, transposed and moved to larger
scales. Weight gradients in bf16 need the values before rounding, so then those are kept.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from ep_plugin.moe.e4m3 import Weight8, WeightBlocks8
from ep_plugin.moe.experts.fused import joined
from ep_plugin.moe.interfaces import GroupedGemm
from ep_plugin.moe.kernels.types import Scales
from ep_plugin.moe.rows import ExpertRows


class Size(NamedTuple):
    """The features of one weight as it is trained."""

    outputs: int
    inputs: int
    parts: int  # of the outputs: 2 for gate and up, else 1


@dataclass(frozen=True)
class Weights:
    """Both weights in e4m3, in the layouts that forward and data gradient read."""

    fc1: Weight8 | WeightBlocks8  # [e, 2F or F, H]
    fc1_transposed: Weight8 | WeightBlocks8  # [e, H, 2F or F]
    fc2: Weight8 | WeightBlocks8  # [e, H, F]
    fc2_transposed: Weight8 | WeightBlocks8  # [e, F, H]
    first: Size  # of fc1
    second: Size  # of fc2


class Fp8(ABC):
    """A `Recipe` of `experts/fused.py`; subclasses add the kernels.

    `weights` are the weights in e4m3, which are read instead of the arguments fc1 and fc2. `wgrad8`
    says whether weight gradients are computed in e4m3, or else in bf16 through `gemm`.
    """

    takes_pieces = False
    scales: Scales

    def __init__(self, rows: ExpertRows, gemm: GroupedGemm, weights: Weights, wgrad8: bool) -> None:
        self.rows, self.gemm, self.weights, self.wgrad8 = rows, gemm, weights, wgrad8

    @abstractmethod
    def _quantize(self, matrix: Tensor) -> Any:
        """Return `matrix` [R, X] in e4m3 with its scales."""

    @abstractmethod
    def _multiply(self, rows: Any, weight: Any) -> Tensor:
        """Return `rows` [R, a] times their expert's `weight` [e, b, a].T: [R, b] bf16."""

    @abstractmethod
    def _transpose(self, rows: Any, choices: int) -> Any:
        """Return `rows` transposed, as an operand of a weight gradient.

        `choices` is 0 for rows of experts, else `rows` are tokens with that many choices.
        """

    @abstractmethod
    def _wgrad8(self, grads: Any, rows: Any, size: Size, into: Tensor | None) -> Tensor | None:
        """Return the weight gradient of two results of `_transpose`, or add it to `into`."""

    def _unpadded(self, matrix: Tensor, parts: int) -> Tensor:
        """Return `matrix` [R, F or 2F], of so many `parts`, without columns that are padding."""
        return matrix

    def keep(self, tokens: Tensor) -> Any:
        return self._quantize(tokens) if self.wgrad8 else tokens.bfloat16()

    def operand(self, kept: Any) -> Any:
        return kept if self.wgrad8 else self._quantize(kept)

    def first(self, operand: Any, fc1: Tensor) -> Tensor:
        return self._multiply(self._spread(operand), self.weights.fc1)

    def second(
        self, hidden: Tensor, probs: Tensor, fc2: Tensor, into: Tensor | None = None
    ) -> Tensor:
        active = self.rows.activate(hidden, probs, self.scales)
        return self.rows.sum(self._multiply(active, self.weights.fc2), into)

    def held(self, hidden: Tensor) -> Any:
        return self._quantize(hidden)

    def incoming(self, grads: Tensor) -> tuple[Any, Any]:
        """Return `grads` as the data gradient reads them, and as the weight gradient does."""
        narrow = self._quantize(grads)
        return narrow, narrow if self.wgrad8 else grads.bfloat16()

    def arrived(self, incoming: tuple[Any, Any]) -> tuple[Any, Any]:
        return incoming

    def all_arrived(self, pieces: list[tuple[Any, Any]]) -> tuple[None, Any]:
        return None, joined([of_weights for _, of_weights in pieces])

    def hidden_grads(
        self, arrived: tuple[Any, Any], hidden: Any, probs: Tensor, fc2: Tensor
    ) -> tuple[Any, Any, Tensor]:
        d_active = self._multiply(self._spread(arrived[0]), self.weights.fc2_transposed)
        scales = self.scales if self.wgrad8 else None
        return self.rows.activate_backward(d_active, hidden, probs, scales)

    def fc2_grads(
        self, arrived: tuple[Any, Any], active: Any, into: Tensor | None
    ) -> Tensor | None:
        if not self.wgrad8:
            grads = self.rows.spread(arrived[1])
            active = self._unpadded(active, self.weights.second.parts)
            return self.rows.wgrad(self.gemm, grads, active, into)
        columns = self._tokens(arrived[1]), self._transpose(active, 0)
        return self._wgrad8(*columns, self.weights.second, into)

    def token_grads(self, d_hidden: Any, fc1: Tensor, into: Tensor | None = None) -> Tensor:
        grads = d_hidden if self.wgrad8 else self._quantize(d_hidden)
        return self.rows.sum(self._multiply(grads, self.weights.fc1_transposed), into)

    def fc1_grads(self, d_hidden: Any, kept: Any, into: Tensor | None) -> Tensor | None:
        if not self.wgrad8:
            d_hidden = self._unpadded(d_hidden, self.weights.first.parts)
            return self.rows.wgrad(self.gemm, d_hidden, self.rows.spread(kept), into)
        columns = self._transpose(d_hidden, 0), self._tokens(kept)
        return self._wgrad8(*columns, self.weights.first, into)

    def _spread(self, tokens: Any) -> Any:
        rows = self.rows
        return rows.ops.spread_rows8(tokens, rows.place, rows.ends, rows.order.shape[0])

    def _tokens(self, tokens: Any) -> Any:
        return self._transpose(tokens, self.rows.place.shape[1])


def sizes(fc1: Tensor, fc2: Tensor) -> tuple[Size, Size]:
    """Return the sizes of the weights fc1 [e, F or 2F, H] and fc2 [e, H, F]."""
    (_, outputs, hidden), (_, _, ffn) = fc1.shape, fc2.shape
    return Size(outputs, hidden, outputs // ffn), Size(hidden, ffn, 1)
