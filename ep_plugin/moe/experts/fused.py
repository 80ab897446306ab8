"""The experts as one autograd function with few passes over memory and few saved tensors.

Saved for the backward are the tokens (in e4m3 with FP8) and, depending on `save`, pre-activations.
The backward copies tokens to rows again, and recomputes the activation in the kernel of its
derivative.

    forward     tokens -> rows -> fc1 -> activation x routing weight -> fc2 -> sum per token
    backward    gradients -> rows -> fc2 -> derivative and activation -> fc1 -> sum per token
                and both weight gradients, which may come last

With a capacity of a rank, its rows are computed in as many passes as they need: the host's number
of rows decides, so it waits for nothing. All of the above is done for one pass at a time, forward
and backward, and each adds its rows to sums per token and per weight, in fp32. Pre-activations are
saved of the first pass; those of the others are computed again. A pass that turns out to have no
rows costs little more than its launches.

A `Recipe` says in which precision the six products are computed: `Bf16` here, the FP8 recipes in
`fp8/`. Rows past the last expert's, of absent choices, are neither read nor written. No host syncs
besides those of the grouped GEMM.

Shapes: N tokens, C choices each, H hidden size, F FFN size of this rank, e local experts, R rows.
"""

import math
from copy import copy
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ep_plugin.moe.config import Save
from ep_plugin.moe.interfaces import GroupedGemm
from ep_plugin.moe.rows import ExpertRows

ALIGNED = 16  # rows; slices from there on start at multiples of 16 bytes
Into = tuple[Tensor | None, Tensor | None]  # totals of fc1, fc2 to add gradients to


class Totals(Protocol):
    """Where a training loop sums the gradients of both weights over micro-batches, in fp32."""

    def take(self) -> Into:
        """Return the fp32 totals [e, out, in] of fc1 and fc2; the caller must add to them."""
        ...


class Recipe(Protocol):
    """How the products of the experts are computed, for the rows of one call or of a part of it.

    What is kept for the backward is a tensor or a record of tensors. Weights are [e, out, in],
    `hidden` (pre-activations) is [R, F or 2F], `probs` (routing weights) [N, C]. A weight gradient
    is returned; with `into` [e, out, in] fp32 it is added there and None is returned. Sums per
    token [N, H] are returned; with `into` [N, H] they are added there, and it is returned.

    What `keep`, `operand` and `incoming` return does not depend on `rows`: all parts of a call
    share it.
    """

    takes_pieces: bool  # whether `fc1_grads` also takes a list of what `keep` returned for parts
    rows: ExpertRows

    def keep(self, tokens: Tensor) -> Any:
        """Return `tokens` [N, H] in the form in which they are kept for the backward."""
        ...

    def operand(self, kept: Any) -> Any:
        """Return what `keep` returned in the form that `first` reads."""
        ...

    def first(self, operand: Any, fc1: Tensor) -> Tensor:
        """Return the pre-activations [R, F or 2F] of what `operand` returned."""
        ...

    def second(
        self, hidden: Tensor, probs: Tensor, fc2: Tensor, into: Tensor | None = None
    ) -> Tensor:
        """Return the experts' outputs, summed for each token: [N, H]."""
        ...

    def held(self, hidden: Tensor) -> Any:
        """Return `hidden` in e4m3, the form in which `save = fp8` keeps it."""
        ...

    def incoming(self, grads: Tensor) -> Any:
        """Return the output's gradients `grads` [N, H] in the form that `arrived` reads."""
        ...

    def arrived(self, incoming: Any) -> Any:
        """Return what `incoming` returned in the form that the methods below read."""
        ...

    def all_arrived(self, pieces: list[Any]) -> Any:
        """Return `arrived` for `fc2_grads` of all rows, of what `incoming` returned in pieces."""
        ...

    def hidden_grads(
        self, arrived: Any, hidden: Any, probs: Tensor, fc2: Tensor
    ) -> tuple[Any, Any, Tensor]:
        """Return the gradient of `hidden`, the activation [R, F], the gradient of `probs`."""
        ...

    def fc2_grads(self, arrived: Any, active: Any, into: Tensor | None) -> Tensor | None:
        """Return the gradient of fc2 from the activation `active` [R, F]."""
        ...

    def token_grads(self, d_hidden: Any, fc1: Tensor, into: Tensor | None = None) -> Tensor:
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

    def operand(self, kept: Tensor) -> Tensor:
        return kept

    def first(self, operand: Tensor, fc1: Tensor) -> Tensor:
        return self.gemm.forward(self.rows.spread(operand), fc1, self.rows.ends)

    def second(
        self, hidden: Tensor, probs: Tensor, fc2: Tensor, into: Tensor | None = None
    ) -> Tensor:
        active = self.rows.activate(hidden, probs)
        return self.rows.sum(self.gemm.forward(active, fc2, self.rows.ends), into)

    def held(self, hidden: Tensor) -> Any:
        return self.rows.ops.quantize_rows(hidden)

    def incoming(self, grads: Tensor) -> Tensor:
        return grads

    def arrived(self, incoming: Tensor) -> Tensor:
        return self.rows.spread(incoming)

    def all_arrived(self, pieces: list[Tensor]) -> Tensor:
        return self.rows.spread(pieces)

    def hidden_grads(
        self, arrived: Tensor, hidden: Any, probs: Tensor, fc2: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        d_active = self.gemm.dgrad(arrived, fc2, self.rows.ends)
        return self.rows.activate_backward(d_active, hidden, probs)

    def fc2_grads(self, arrived: Tensor, active: Tensor, into: Tensor | None) -> Tensor | None:
        return self.rows.wgrad(self.gemm, arrived, active, into)

    def token_grads(self, d_hidden: Tensor, fc1: Tensor, into: Tensor | None = None) -> Tensor:
        return self.rows.sum(self.gemm.dgrad(d_hidden, fc1, self.rows.ends), into)

    def fc1_grads(
        self, d_hidden: Tensor, kept: Tensor | list[Tensor], into: Tensor | None
    ) -> Tensor | None:
        return self.rows.wgrad(self.gemm, d_hidden, self.rows.spread(kept), into)


@dataclass(frozen=True)
class Keep:
    """How many rows a call computes at a time, and what it keeps of the first for the backward."""

    save: Save
    rows: int | None = None  # of a pass; None: all
    least: float = 0.0  # of a call's rows a pass has at least this share

    def passes(self, recipe: Recipe) -> list[Recipe]:
        """Return `recipe` for each pass: itself if one takes all rows of the call."""
        if not self.several(recipe):
            return [recipe]
        num_rows, found = recipe.rows.order.shape[0], []
        size = self.at_once(num_rows)
        for first in range(0, num_rows, size):
            found.append(copy(recipe))
            found[-1].rows = recipe.rows.part(first, min(first + size, num_rows))
        return found

    def several(self, recipe: Recipe) -> bool:
        """Whether a call of `recipe` needs more than one pass."""
        num_rows = recipe.rows.order.shape[0]
        return self.at_once(num_rows) < num_rows

    def at_once(self, num_rows: int) -> int:
        """Return how many of a call's `num_rows` rows are computed at a time."""
        if self.rows is None:
            return num_rows
        rows = max(1, self.rows, math.ceil(num_rows * self.least))
        return min(num_rows, -(-rows // ALIGNED) * ALIGNED)

    def hold(self, recipe: Recipe, hidden: Tensor) -> Any:
        """Return what is kept of the first pass's `hidden` [R, F or 2F]."""
        if self.save == "recompute":
            return None
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
        first, *later = keep.passes(recipe)
        operand, into = recipe.operand(kept), sums(recipe, fc1, tokens.dtype) if later else None
        hidden = first.first(operand, fc1)
        operand = operand if later else None  # in e4m3 it may be a copy of its own
        output, held = first.second(hidden, probs, fc2, into), keep.hold(first, hidden)
        del hidden
        for each in later:
            each.second(each.first(operand, fc1), probs, fc2, into)
        ctx.recipe, ctx.keep, ctx.totals = recipe, keep, totals
        ctx.kinds = type(kept), type(held)
        ctx.num_kept = len(parts_of(kept))
        ctx.save_for_backward(probs, fc1, fc2, *parts_of(kept), *parts_of(held))
        return output.to(tokens.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        probs, fc1, fc2, *parts = ctx.saved_tensors
        kept = whole_of(ctx.kinds[0], parts[: ctx.num_kept])
        held = whole_of(ctx.kinds[1], parts[ctx.num_kept :])
        weights = WeightSums(ctx.totals, fc1, fc2, ctx.keep.several(ctx.recipe))
        call = Backward(ctx.recipe, ctx.keep, kept, held, probs, weights)
        d_tokens, d_probs = call.run(grads[0].contiguous())
        return d_tokens, d_probs.to(probs.dtype), *weights.delivered(), *[None] * 4


def sums(recipe: Recipe, fc1: Tensor, dtype: torch.dtype) -> Tensor:
    """Return zeros [N, H] that the passes of `recipe` add to, for a result of `dtype`.

    They are in fp32 or wider, or of `dtype` where a token has one choice and nothing is added up.
    """
    num_tokens, choices = recipe.rows.place.shape
    wide = dtype if choices == 1 else torch.promote_types(dtype, torch.float32)
    return fc1.new_zeros(num_tokens, fc1.shape[2], dtype=wide)


class WeightSums:
    """The gradients of both weights [e, out, in] in one backward, of one pass or summed over some.

    They are added to the totals. Without totals several passes add to fp32 of their own.
    """

    def __init__(
        self, totals: Totals | None, fc1: Tensor, fc2: Tensor, several: bool = False
    ) -> None:
        self.fc1, self.fc2 = fc1, fc2
        given: Into = (None, None) if totals is None else totals.take()
        self.found: list[Tensor | None] = [None, None]  # gradients that are in no totals
        for i, (total, weight) in enumerate(zip(given, (fc1, fc2), strict=True)):
            if total is None and several:
                wide = torch.promote_types(weight.dtype, torch.float32)
                self.found[i] = torch.zeros_like(weight, dtype=wide)
        own = self.found
        self.into = [own[i] if total is None else total for i, total in enumerate(given)]

    def add_fc1(self, recipe: Recipe, d_hidden: Any, kept: Any) -> None:
        """Add what `Recipe.fc1_grads` gives."""
        gradient = recipe.fc1_grads(d_hidden, kept, self.into[0])
        self.found[0] = self.found[0] if gradient is None else gradient

    def add_fc2(self, recipe: Recipe, arrived: Any, active: Any) -> None:
        """Add what `Recipe.fc2_grads` gives."""
        gradient = recipe.fc2_grads(arrived, active, self.into[1])
        self.found[1] = self.found[1] if gradient is None else gradient

    def delivered(self) -> tuple[Tensor, Tensor]:
        """Return the gradients of fc1 and fc2 in the weights' dtype.

        In the place of one that is in the totals stands a tensor of that shape. The training loop
        needs one from autograd, to know that there was a gradient. It never reads its values.
        """
        d_fc1, d_fc2 = self.found
        return (
            torch.empty_like(self.fc1) if d_fc1 is None else d_fc1.to(self.fc1.dtype),
            torch.empty_like(self.fc2) if d_fc2 is None else d_fc2.to(self.fc2.dtype),
        )


@dataclass(frozen=True)
class Backward:
    """The backward of a call, from what its forward kept."""

    recipe: Recipe
    keep: Keep
    kept: Any  # what `Recipe.keep` returned
    held: Any  # what `Keep.hold` returned
    probs: Tensor
    weights: WeightSums

    def run(self, grads: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of tokens [N, H] and `probs`; those of weights go to `weights`.

        `grads` [N, H] are those of the output.
        """
        recipe, into, operand = self.recipe, None, None
        first, *later = self.keep.passes(recipe)
        if later:
            into = sums(recipe, self.weights.fc1, grads.dtype)
        if later or self.held is None:
            operand = recipe.operand(self.kept)
        # What all passes read lies in lists, from which the last takes it: it is freed in there.
        operands, incoming = [operand], [recipe.incoming(grads)]
        del operand
        d_tokens, d_probs = self._pass(first, self.held, operands, incoming, into, not later)
        for i, each in enumerate(later, 1):
            last = i == len(later)
            d_probs = d_probs + self._pass(each, None, operands, incoming, into, last)[1]
        return d_tokens.to(grads.dtype), d_probs

    def hidden(self) -> Any:
        """Return the pre-activations of a call of one pass."""
        if self.held is not None:
            return self.held
        return self.recipe.first(self.recipe.operand(self.kept), self.weights.fc1)

    def _pass(
        self,
        recipe: Recipe,
        held: Any,
        operands: list[Any],
        incoming: list[Any],
        into: Tensor | None,
        last: bool,
    ) -> tuple[Tensor, Tensor]:
        weights = self.weights
        hidden = recipe.first(operands[0], weights.fc1) if held is None else held
        arrived = recipe.arrived(incoming[0])
        if last:
            operands.clear()
            incoming.clear()
        d_hidden, active, d_probs = recipe.hidden_grads(arrived, hidden, self.probs, weights.fc2)
        weights.add_fc2(recipe, arrived, active)
        del arrived, active, hidden
        d_tokens = recipe.token_grads(d_hidden, weights.fc1, into)
        weights.add_fc1(recipe, d_hidden, self.kept)
        return d_tokens, d_probs


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
