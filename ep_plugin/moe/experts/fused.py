"""The experts as one autograd function with few passes over memory and few saved tensors.

Saved for the backward are the tokens (in e4m3 with FP8) and, depending on `save` and on the
capacity of a rank, the pre-activations of all rows, of some, or of none. The backward copies tokens
to rows again, and recomputes the activation in the kernel of its derivative.

    forward     tokens -> rows -> fc1 -> activation x routing weight -> fc2 -> sum per token
    backward    gradients -> rows -> fc2 -> derivative and activation -> fc1 -> sum per token
                and both weight gradients, which may come last

A `Recipe` says in which precision the six products are computed: `Bf16` here, the FP8 recipes in
`fp8/`. Rows past the last expert's, of absent choices, are neither read nor written. No host syncs
besides those of the grouped GEMM.

Shapes: N tokens, C choices each, H hidden size, F FFN size of this rank, e local experts, R rows.
"""

from copy import copy
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ep_plugin.moe.config import Save
from ep_plugin.moe.interfaces import GroupedGemm
from ep_plugin.moe.rows import ExpertRows, InTwo

Into = tuple[Tensor | None, Tensor | None]  # totals of fc1, fc2 to add gradients to


class Totals(Protocol):
    """Where a training loop sums the gradients of both weights over micro-batches, in fp32."""

    def take(self) -> Into:
        """Return the fp32 totals [e, out, in] of fc1 and fc2; the caller must add to them."""
        ...


class Recipe(Protocol):
    """How the products of the experts are computed, for the rows of one call.

    What is kept for the backward is a tensor or a record of tensors. Weights are [e, out, in],
    `hidden` (pre-activations) is [R, F or 2F], `probs` (routing weights) [N, C]. A weight gradient
    is returned; with `into` [e, out, in] fp32 it is added there and None is returned.
    """

    takes_pieces: bool  # whether `fc1_grads` also takes a list of what `keep` returned for parts
    rows: ExpertRows

    def keep(self, tokens: Tensor) -> Any:
        """Return `tokens` [N, H] in the form in which they are kept for the backward."""
        ...

    def first(self, kept: Any, fc1: Tensor) -> Tensor:
        """Return the pre-activations [R, F or 2F] of what `keep` returned."""
        ...

    def second(self, hidden: Tensor, probs: Tensor, fc2: Tensor) -> Tensor:
        """Return the experts' outputs, summed for each token: [N, H]."""
        ...

    def held(self, hidden: Tensor) -> Any:
        """Return `hidden` in e4m3, the form in which `save = fp8` keeps it."""
        ...

    def incoming(self, grads: Tensor) -> Any:
        """Return the output's gradients `grads` [N, H] in the form that the methods below read."""
        ...

    def all_incoming(self, grads: list[Tensor], pieces: list[Any]) -> Any:
        """Return `incoming` of all `grads`, given in pieces; `pieces` are its result for each."""
        ...

    def hidden_grads(
        self, incoming: Any, hidden: Any, probs: Tensor, fc2: Tensor
    ) -> tuple[Any, Any, Tensor]:
        """Return the gradient of `hidden`, the activation [R, F], the gradient of `probs`."""
        ...

    def fc2_grads(self, incoming: Any, active: Any, into: Tensor | None) -> Tensor | None:
        """Return the gradient of fc2 from the activation `active` [R, F]."""
        ...

    def token_grads(self, d_hidden: Any, fc1: Tensor) -> Tensor:
        """Return the gradient of the tokens: [N, H]."""
        ...

    def fc1_grads(self, d_hidden: Any, kept: Any, into: Tensor | None) -> Tensor | None:
        """Return the gradient of fc1 from what `keep` returned."""
        ...


class Bf16:
    """The recipe that computes in the dtype of the tensors: bf16, fp16 or fp32."""

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


@dataclass(frozen=True)
class Keep:
    """What of the pre-activations is kept for the backward."""

    save: Save
    rows: int | None = None  # of how many rows at most; None: of all

    def hold(self, recipe: Recipe, hidden: Tensor) -> Any:
        """Return what is kept of `hidden` [R, F or 2F]."""
        if self.save == "recompute":
            return None
        if self.rows is not None and self.rows < len(hidden):
            hidden = hidden[: self.rows]
            hidden = hidden.clone() if self.save == "bf16" else hidden  # not a view of all
        return hidden if self.save == "bf16" else recipe.held(hidden)


class FusedExperts(torch.autograd.Function):
    """tokens [N, H], probs [N, C], weights [e, out, in] -> experts' outputs per token [N, H].

    `tokens8` is the e4m3 record of the tokens if they were dispatched in e4m3, else None.
    """

    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        probs: Tensor,
        fc1: Tensor,
        fc2: Tensor,
        recipe: Recipe,
        keep: Keep,
        totals: Totals | None,
        tokens8: Any,
    ) -> Tensor:
        probs, kept = probs.contiguous(), recipe.keep(tokens) if tokens8 is None else tokens8
        hidden = recipe.first(kept, fc1)
        output, held = recipe.second(hidden, probs, fc2), keep.hold(recipe, hidden)
        ctx.recipe, ctx.totals = recipe, totals
        ctx.kinds = type(kept), type(held)
        ctx.num_kept = len(parts_of(kept))
        ctx.save_for_backward(probs, fc1, fc2, *parts_of(kept), *parts_of(held))
        return output.to(tokens.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        recipe: Recipe = ctx.recipe
        probs, fc1, fc2, *parts = ctx.saved_tensors
        kept = whole_of(ctx.kinds[0], parts[: ctx.num_kept])
        held = whole_of(ctx.kinds[1], parts[ctx.num_kept :])
        hidden = again(recipe, held, kept, fc1)
        into = take(ctx.totals)
        incoming = recipe.incoming(grads[0].contiguous())
        d_hidden, active, d_probs = recipe.hidden_grads(incoming, hidden, probs, fc2)
        d_fc2 = delivered(recipe.fc2_grads(incoming, active, into[1]), fc2)
        del incoming, active, hidden
        d_tokens = recipe.token_grads(d_hidden, fc1)
        d_fc1 = delivered(recipe.fc1_grads(d_hidden, kept, into[0]), fc1)
        return d_tokens, d_probs.to(probs.dtype), d_fc1, d_fc2, None, None, None, None


def again(recipe: Recipe, held: Any, kept: Any, fc1: Tensor) -> Any:
    """Return the pre-activations of all rows, of what `Keep.hold` and `Recipe.keep` returned."""
    if held is None:
        return recipe.first(kept, fc1)
    count = len(held.data)
    if count == len(recipe.rows.order):
        return held
    others = copy(recipe)
    others.rows = recipe.rows.beyond(count)
    return InTwo(held, others.first(kept, fc1))


def take(totals: Totals | None) -> Into:
    """Return the totals that one backward adds its weight gradients to."""
    return (None, None) if totals is None else totals.take()


def delivered(grad: Tensor | None, weight: Tensor) -> Tensor:
    """Return `grad` in the dtype of `weight`; if it is None, a placeholder of that shape.

    It is None when it was added to the totals. The training loop still needs a gradient from
    autograd, to know that there was one. It never reads its values.
    """
    return torch.empty_like(weight) if grad is None else grad.to(weight.dtype)


def parts_of(value: Any) -> list[Tensor]:
    """Return the tensors of `value`: a tensor, a record of tensors, or None."""
    if value is None:
        return []
    return [value] if isinstance(value, Tensor) else list(vars(value).values())


def whole_of(kind: Any, parts: list[Tensor]) -> Any:
    """Return the value of type `kind` whose `parts_of` are `parts`."""
    if kind is type(None):
        return None
    return parts[0] if issubclass(kind, Tensor) else kind(*parts)


def joined(pieces: list[Any]) -> Any:
    """Return one tensor, or record of tensors, that concatenates the rows of all pieces."""
    tensors = [torch.cat(same) for same in zip(*map(parts_of, pieces), strict=True)]
    return whole_of(type(pieces[0]), tensors)
