"""The experts as one function of its own backward: nothing is written twice or kept that need not.

Kept between forward and backward are the tokens as they came (in e4m3 with FP8) and the
pre-activations; rows are made again, and the activation is computed again on the way.

    forward     tokens -> rows -> fc1 -> activation x probability -> fc2 -> sum per token
    backward    gradients -> rows -> fc2 -> slopes and activation -> fc1 -> sum per token
                and both weight gradients

In which precision the six products are is a `Recipe`: `Bf16` here, the others in `fp8/`. Rows
behind the last expert's, of absent choices, are neither read nor written. No host syncs.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from ep_plugin.config import Save
from ep_plugin.contracts import GroupedGemm
from ep_plugin.kernels import Rows

Into = tuple[Tensor | None, Tensor | None]  # fc1, fc2
Grads = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # of tokens, probs, fc1, fc2


class Totals(Protocol):
    """Where a training loop sums the gradients of both weights over micro-batches, in fp32."""

    def take(self) -> Into:
        """Return the sums [e, out, in] of fc1 and fc2; what is added counts as delivered."""
        ...


class Recipe(Protocol):
    """How the products of the experts are computed, for the rows of one call.

    What is kept is a tensor or a record of tensors. Weights are [e, out, in], hidden [R, F or 2F].
    `has_own_products` says whether it needs no grouped GEMM, but for weight gradients in bf16.
    """

    has_own_products: bool

    def keep(self, tokens: Tensor) -> Any:
        """Return `tokens` [N, H] as they are kept for the backward."""
        ...

    def first(self, kept: Any, fc1: Tensor) -> Tensor:
        """Return the pre-activations."""
        ...

    def second(self, hidden: Tensor, probs: Tensor, fc2: Tensor) -> Tensor:
        """Return the sum [N, H] over each token's outputs."""
        ...

    def narrow(self, hidden: Tensor) -> Any:
        """Return `hidden` in e4m3, as save = fp8 keeps it."""
        ...

    def backward(
        self,
        grads: Tensor,
        kept: Any,
        hidden: Any,
        probs: Tensor,
        weights: tuple[Tensor, Tensor],
        into: Into,
    ) -> Grads:
        """Return all gradients for those of the output, `grads` [N, H].

        A weight's is None where it was added to the one of `into`.
        """
        ...


class Bf16:
    """Products of the tensors as they are: bf16, or whatever their dtype is."""

    has_own_products = False

    def __init__(self, rows: Rows, gemm: GroupedGemm) -> None:
        self.rows, self.gemm = rows, gemm

    def keep(self, tokens: Tensor) -> Tensor:
        return tokens

    def first(self, kept: Tensor, fc1: Tensor) -> Tensor:
        return self.gemm.forward(self.rows.spread(kept), fc1, self.rows.ends)

    def second(self, hidden: Tensor, probs: Tensor, fc2: Tensor) -> Tensor:
        active = self.rows.activate(hidden, probs)
        return self.rows.sum(self.gemm.forward(active, fc2, self.rows.ends))

    def narrow(self, hidden: Tensor) -> Any:
        return self.rows.ops.quantize_rows(hidden)

    def backward(
        self,
        grads: Tensor,
        kept: Tensor,
        hidden: Any,
        probs: Tensor,
        weights: tuple[Tensor, Tensor],
        into: Into,
    ) -> Grads:
        rows, gemm, ends = self.rows, self.gemm, self.rows.ends
        d_rows = rows.spread(grads)
        d_active = gemm.dgrad(d_rows, weights[1], ends)
        d_hidden, active, d_probs = rows.activate_backward(d_active, hidden, probs)
        d_fc2 = rows.wgrad(gemm, d_rows, active, into[1])
        del d_rows, d_active, active
        d_tokens = rows.sum(gemm.dgrad(d_hidden, weights[0], ends))
        return d_tokens, d_probs, rows.wgrad(gemm, d_hidden, rows.spread(kept), into[0]), d_fc2


class FusedExperts(torch.autograd.Function):
    """tokens [N, H], probs [N, C], weights [e, out, in] -> [N, H]."""

    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        probs: Tensor,
        fc1: Tensor,
        fc2: Tensor,
        recipe: Recipe,
        save: Save,
        totals: Totals | None,
    ) -> Tensor:
        probs, kept = probs.contiguous(), recipe.keep(tokens.contiguous())
        hidden = recipe.first(kept, fc1)
        output = recipe.second(hidden, probs, fc2)
        held: Any = hidden if save == "bf16" else None
        if save == "fp8":
            held = recipe.narrow(hidden)
        ctx.recipe, ctx.totals, ctx.kinds = recipe, totals, (type(kept), type(held))
        ctx.num_kept = len(_parts(kept))
        ctx.save_for_backward(probs, fc1, fc2, *_parts(kept), *_parts(held))
        return output.to(tokens.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        recipe: Recipe = ctx.recipe
        probs, fc1, fc2, *parts = ctx.saved_tensors
        kept = _whole(ctx.kinds[0], parts[: ctx.num_kept])
        hidden = _whole(ctx.kinds[1], parts[ctx.num_kept :])
        if hidden is None:
            hidden = recipe.first(kept, fc1)
        into: Into = (None, None) if ctx.totals is None else ctx.totals.take()
        d_tokens, d_probs, d_fc1, d_fc2 = recipe.backward(
            grads[0].contiguous(), kept, hidden, probs, (fc1, fc2), into
        )
        # Who takes sums wants a gradient all the same, to know that it was there: one never read.
        weights = [
            torch.empty_like(weight) if grad is None else grad.to(weight.dtype)
            for weight, grad in ((fc1, d_fc1), (fc2, d_fc2))
        ]
        return d_tokens, d_probs.to(probs.dtype), *weights, None, None, None


def _parts(value: Any) -> list[Tensor]:
    """Return the tensors of a tensor, of a record of tensors, or of nothing."""
    if value is None:
        return []
    return [value] if isinstance(value, Tensor) else list(vars(value).values())


def _whole(kind: Any, parts: list[Tensor]) -> Any:
    """Return what `_parts` was given."""
    if kind is type(None):
        return None
    return parts[0] if issubclass(kind, Tensor) else kind(*parts)
