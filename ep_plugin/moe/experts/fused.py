"""The experts as one function of its own backward: nothing is written twice or kept that need not.

Kept between forward and backward are the tokens as they came (in e4m3 with FP8) and the
pre-activations; rows are made again, and the activation is computed again on the way.

    forward     tokens -> rows -> fc1 -> activation x probability -> fc2 -> sum per token
    backward    gradients -> rows -> fc2 -> slopes and activation -> fc1 -> sum per token
                and both weight gradients, which may come last of all

In which precision the six products are is a `Recipe`: `Bf16` here, the others in `fp8/`. Rows
behind the last expert's, of absent choices, are neither read nor written. No host syncs.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from ep_plugin.moe.config import Save
from ep_plugin.moe.interfaces import GroupedGemm
from ep_plugin.moe.rows import ExpertRows

Into = tuple[Tensor | None, Tensor | None]  # where the gradients of fc1 and fc2 are added


class Totals(Protocol):
    """Where a training loop sums the gradients of both weights over micro-batches, in fp32."""

    def take(self) -> Into:
        """Return the sums [e, out, in] of fc1 and fc2; what is added counts as delivered."""
        ...


class Recipe(Protocol):
    """How the products of the experts are computed, for the rows of one call.

    What is kept is a tensor or a record of tensors. Weights are [e, out, in], hidden [R, F or 2F].
    A gradient of a weight is returned, or added to `into` [e, out, in] fp32 and None returned.
    """

    takes_pieces: bool  # fc1_grads takes what is kept of several pieces of the tokens as a list
    rows: ExpertRows

    def keep(self, tokens: Tensor) -> Any:
        """Return `tokens` [N, H] as they are kept for the backward."""
        ...

    def first(self, kept: Any, fc1: Tensor) -> Tensor:
        """Return the pre-activations."""
        ...

    def second(self, hidden: Tensor, probs: Tensor, fc2: Tensor) -> Tensor:
        """Return the sum [N, H] over each token's outputs."""
        ...

    def held(self, hidden: Tensor) -> Any:
        """Return `hidden` in e4m3, as save = fp8 keeps it."""
        ...

    def incoming(self, grads: Tensor) -> Any:
        """Return the gradients of the output, `grads` [N, H], as the next two read them."""
        ...

    def all_incoming(self, grads: list[Tensor], pieces: list[Any]) -> Any:
        """Return `incoming` for gradients in pieces; `pieces` are what it returned for each."""
        ...

    def hidden_grads(
        self, incoming: Any, hidden: Any, probs: Tensor, fc2: Tensor
    ) -> tuple[Any, Any, Tensor]:
        """Return the gradients of `hidden`, the activation [R, F] again, the gradients of probs."""
        ...

    def fc2_grads(self, incoming: Any, active: Any, into: Tensor | None) -> Tensor | None:
        """Return the gradients of fc2."""
        ...

    def token_grads(self, d_hidden: Any, fc1: Tensor) -> Tensor:
        """Return the gradients of the tokens [N, H]."""
        ...

    def fc1_grads(self, d_hidden: Any, kept: Any, into: Tensor | None) -> Tensor | None:
        """Return the gradients of fc1."""
        ...


class Bf16:
    """Products of the tensors as they are: bf16, or whatever their dtype is."""

    takes_pieces = True

    def __init__(self, rows: ExpertRows, gemm: GroupedGemm) -> None:
        self.rows, self.gemm = rows, gemm

    def keep(self, tokens: Tensor) -> Tensor:
        return tokens

    def first(self, kept: Tensor, fc1: Tensor) -> Tensor:
        return self.gemm.forward(self.rows.spread(kept), fc1, self.rows.ends)

    def second(self, hidden: Tensor, probs: Tensor, fc2: Tensor) -> Tensor:
        active = self.rows.activate(hidden, probs)
        return self.rows.sum(self.gemm.forward(active, fc2, self.rows.ends))

    def held(self, hidden: Tensor) -> Any:
        return self.rows.ops.quantize_rows(hidden)

    def incoming(self, grads: Tensor) -> Tensor:
        return self.rows.spread(grads)

    def all_incoming(self, grads: list[Tensor], pieces: list[Tensor]) -> Tensor:
        return self.rows.spread(grads)

    def hidden_grads(
        self, incoming: Tensor, hidden: Any, probs: Tensor, fc2: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        d_active = self.gemm.dgrad(incoming, fc2, self.rows.ends)
        return self.rows.activate_backward(d_active, hidden, probs)

    def fc2_grads(self, incoming: Tensor, active: Tensor, into: Tensor | None) -> Tensor | None:
        return self.rows.wgrad(self.gemm, incoming, active, into)

    def token_grads(self, d_hidden: Tensor, fc1: Tensor) -> Tensor:
        return self.rows.sum(self.gemm.dgrad(d_hidden, fc1, self.rows.ends))

    def fc1_grads(
        self, d_hidden: Tensor, kept: Tensor | list[Tensor], into: Tensor | None
    ) -> Tensor | None:
        return self.rows.wgrad(self.gemm, d_hidden, self.rows.spread(kept), into)


class FusedExperts(torch.autograd.Function):
    """tokens [N, H], probs [N, C], weights [e, out, in] -> [N, H].

    `tokens8` are the tokens as the recipe would keep them, where they came so.
    """

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
        tokens8: Any,
    ) -> Tensor:
        probs, kept = probs.contiguous(), recipe.keep(tokens) if tokens8 is None else tokens8
        hidden = recipe.first(kept, fc1)
        output, held = recipe.second(hidden, probs, fc2), hold(recipe, hidden, save)
        ctx.recipe, ctx.totals, ctx.kinds = recipe, totals, (type(kept), type(held))
        ctx.num_kept = len(parts_of(kept))
        ctx.save_for_backward(probs, fc1, fc2, *parts_of(kept), *parts_of(held))
        return output.to(tokens.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        recipe: Recipe = ctx.recipe
        probs, fc1, fc2, *parts = ctx.saved_tensors
        kept = whole_of(ctx.kinds[0], parts[: ctx.num_kept])
        hidden = whole_of(ctx.kinds[1], parts[ctx.num_kept :])
        if hidden is None:
            hidden = recipe.first(kept, fc1)
        into = take(ctx.totals)
        incoming = recipe.incoming(grads[0].contiguous())
        d_hidden, active, d_probs = recipe.hidden_grads(incoming, hidden, probs, fc2)
        d_fc2 = delivered(recipe.fc2_grads(incoming, active, into[1]), fc2)
        del incoming, active, hidden
        d_tokens = recipe.token_grads(d_hidden, fc1)
        d_fc1 = delivered(recipe.fc1_grads(d_hidden, kept, into[0]), fc1)
        return d_tokens, d_probs.to(probs.dtype), d_fc1, d_fc2, None, None, None, None


def take(totals: Totals | None) -> Into:
    """Return where gradients of weights are added, for one backward."""
    return (None, None) if totals is None else totals.take()


def delivered(grad: Tensor | None, weight: Tensor) -> Tensor:
    """Return `grad` in the dtype of `weight`; for one that was added elsewhere a place holder.

    Who takes sums wants a gradient all the same, to know that it was there: its values are never
    read, nor written.
    """
    return torch.empty_like(weight) if grad is None else grad.to(weight.dtype)


def hold(recipe: Recipe, hidden: Tensor, save: Save) -> Any:
    """Return what `save` holds of the pre-activations."""
    if save == "recompute":
        return None
    return hidden if save == "bf16" else recipe.held(hidden)


def parts_of(value: Any) -> list[Tensor]:
    """Return the tensors of a tensor, of a record of tensors, or of nothing."""
    if value is None:
        return []
    return [value] if isinstance(value, Tensor) else list(vars(value).values())


def whole_of(kind: Any, parts: list[Tensor]) -> Any:
    """Return what `parts_of` was given, of type `kind`."""
    if kind is type(None):
        return None
    return parts[0] if issubclass(kind, Tensor) else kind(*parts)


def joined(pieces: list[Any]) -> Any:
    """Return one matrix, or record of matrices, with the rows of all pieces."""
    tensors = [torch.cat(same) for same in zip(*map(parts_of, pieces), strict=True)]
    return whole_of(type(pieces[0]), tensors)
