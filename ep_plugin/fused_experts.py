"""The experts as one function of its own backward: nothing is written twice or kept that need not.

Kept between forward and backward are the tokens as they came (in e4m3 with FP8) and the
pre-activations; rows are made again, and the activation is computed again on the way.

    forward     tokens -> rows -> fc1 -> activation x probability -> fc2 -> sum per token
    backward    gradients -> rows -> fc2 -> slopes and activation -> fc1 -> sum per token
                and both weight gradients

Rows behind the last expert's, of absent choices, are neither read nor written. No host syncs.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ep_plugin.config import Save
from ep_plugin.contracts import GroupedGemm
from ep_plugin.e4m3 import Columns8, Rows8, Weight8
from ep_plugin.fp8.rowwise import multiply, multiply_columns
from ep_plugin.kernels import select


@dataclass(frozen=True)
class Weights8:
    """Both weights in e4m3, in the layouts of forward and of data gradient."""

    fc1: Weight8  # [e, 2F or F, H]
    fc1_transposed: Weight8  # [e, H, 2F or F]
    fc2: Weight8  # [e, H, F]
    fc2_transposed: Weight8  # [e, F, H]


def quantize_weights(fc1: Tensor, fc2: Tensor) -> Weights8:
    """Return both weights [e, out, in] in e4m3; once per optimizer step is enough."""
    ops = select(fc1)
    return Weights8(*ops.quantize_weight(fc1), *ops.quantize_weight(fc2))


@dataclass(frozen=True)
class Job:
    """What does not change between forward and backward."""

    order: Tensor  # [R] int32 flat choice of each row
    place: Tensor  # [N, C] int32 row of each choice
    ends: Tensor  # [e] int32 row behind each expert's last
    activation: str
    save: Save  # how pre-activations are kept for the backward
    ops: Any  # kernels.experts, or its twin
    gemm: GroupedGemm  # bf16 products
    weights: Weights8 | None  # FP8 products where given

    def keep(self, tokens: Tensor) -> Any:
        """Return `tokens` [N, H] as the products read them: in e4m3 with FP8."""
        return tokens if self.weights is None else self.ops.quantize_rows(tokens)

    def spread(self, tokens: Any) -> Any:
        """Return the token of each row, of a tensor or of Rows8."""
        spread = self.ops.spread_rows8 if isinstance(tokens, Rows8) else self.ops.spread_rows
        return spread(tokens, self.place, self.ends)

    def sum(self, rows: Tensor) -> Tensor:
        """Return the sum over each token's rows."""
        summed: Tensor = self.ops.sum_rows(rows, self.place, self.ends)
        return summed

    def hidden(self, kept: Any, fc1: Tensor) -> Tensor:
        """Return the pre-activations [R, F or 2F]."""
        rows = self.spread(kept)
        if self.weights is None:
            return self.gemm.forward(rows, fc1, self.ends)
        return multiply(rows, self.weights.fc1, self.ends)

    def columns(self, rows: Rows8, padded: Any, are_tokens: bool) -> Columns8:
        """Return an operand of a weight gradient, from rows or from tokens."""
        choices = self.place.shape[1] if are_tokens else 0
        columns: Columns8 = self.ops.transpose_rows(rows, padded, self.order, self.ends, choices)
        return columns


class FusedExperts(torch.autograd.Function):
    """tokens [N, H], probs [N, C], weights [e, out, in] -> [N, H]."""

    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, probs: Tensor, fc1: Tensor, fc2: Tensor, job: Job
    ) -> Tensor:
        probs, fp8 = probs.contiguous(), job.weights is not None
        kept = job.keep(tokens)
        hidden = job.hidden(kept, fc1)
        active = job.ops.activate(hidden, probs, job.order, job.ends, job.activation, fp8)
        if job.weights is None:
            output = job.gemm.forward(active, fc2, job.ends)
        else:
            output = multiply(active, job.weights.fc2, job.ends)
        saved = {"bf16": [hidden], "fp8": [], "recompute": []}[job.save]
        if job.save == "fp8":
            saved = _parts(job.ops.quantize_rows(hidden))
        ctx.job = job
        ctx.save_for_backward(probs, fc1, fc2, *_parts(kept), *saved)
        return job.sum(output).to(tokens.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        job: Job = ctx.job
        probs, fc1, fc2, *parts = ctx.saved_tensors
        kept: Any = parts[0] if job.weights is None else Rows8(*parts[:2])
        hidden: Any = parts[-1]
        if job.save == "fp8":
            hidden = Rows8(*parts[-2:])
        elif job.save == "recompute":
            hidden = job.hidden(kept, fc1)
        incoming = job.keep(grads[0].contiguous())
        backward = _bf16_backward if job.weights is None else _fp8_backward
        d_tokens, d_probs, d_fc1, d_fc2 = backward(job, incoming, kept, hidden, probs, fc1, fc2)
        return d_tokens, d_probs.to(probs.dtype), d_fc1.to(fc1.dtype), d_fc2.to(fc2.dtype), None


def _parts(value: Any) -> list[Tensor]:
    return [value.data, value.scale] if isinstance(value, Rows8) else [value]


Grads = tuple[Tensor, Tensor, Tensor, Tensor]  # of tokens, probs, fc1, fc2


def _bf16_backward(
    job: Job, incoming: Tensor, kept: Tensor, hidden: Any, probs: Tensor, fc1: Tensor, fc2: Tensor
) -> Grads:
    d_rows = job.spread(incoming)
    d_active = job.gemm.dgrad(d_rows, fc2, job.ends)
    d_hidden, active, d_probs = job.ops.activate_backward(
        d_active, hidden, probs, job.order, job.ends, job.activation, False
    )
    d_fc2 = job.gemm.wgrad(d_rows, active, job.ends)
    del d_rows, d_active, active
    d_tokens = job.sum(job.gemm.dgrad(d_hidden, fc1, job.ends))
    return d_tokens, d_probs, job.gemm.wgrad(d_hidden, job.spread(kept), job.ends), d_fc2


def _fp8_backward(
    job: Job, incoming: Rows8, kept: Rows8, hidden: Any, probs: Tensor, fc1: Tensor, fc2: Tensor
) -> Grads:
    assert job.weights is not None
    d_active = multiply(job.spread(incoming), job.weights.fc2_transposed, job.ends)
    d_hidden, active, d_probs = job.ops.activate_backward(
        d_active, hidden, probs, job.order, job.ends, job.activation, True
    )
    del d_active
    d_tokens = job.sum(multiply(d_hidden, job.weights.fc1_transposed, job.ends))
    padded = job.ops.pad_columns(len(job.order), job.ends)
    ends = padded[2]
    d_fc2 = multiply_columns(
        job.columns(incoming, padded, True), job.columns(active, padded, False), ends
    )
    d_fc1 = multiply_columns(
        job.columns(d_hidden, padded, False), job.columns(kept, padded, True), ends
    )
    return d_tokens, d_probs, d_fc1, d_fc2
