"""Exchange, experts and exchange back as one function of its own backward, part by part.

The mathematics are those of `fused_experts`: a `Recipe` for the rows of each part, and one for all
rows, in the order that one after another would give them, for the weight gradients; so every result
has the same bits. What that costs beside `FusedExperts`, in bytes of device memory traffic for a
row of the experts, b bytes wide in what weight gradients read (2, or 1 for rowwise): with bf16 the
gradients of the output are spread a second time, 2 H b; with FP8 what is kept of tokens and of
gradients is joined, 2 H b each for a token received; and where token gradients go home part by
part, the activation and the gradients of the pre-activations are moved once, 6 F b (gated).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ep_plugin.moe.config import Save
from ep_plugin.moe.experts.fused import Recipe, Totals, delivered, hold, take
from ep_plugin.moe.kernels import Rows, plan
from ep_plugin.moe.records import joined, parts_of, whole_of
from ep_plugin.moe.rows import count_choices
from ep_plugin.moe.schedule._chunked_gradients import AtOnce, PartByPart
from ep_plugin.moe.schedule._trip import Part, Trip, collected, set_out


@dataclass(frozen=True)
class Call:
    """One call of the function, beside its differentiable tensors."""

    trip: Trip
    expert_ids: Tensor  # [N, C] of the rows received, by distance
    probs: Tensor  # [N, C], likewise
    tokens_per_expert: Tensor  # [e]
    activation: str
    recipes: Callable[[Rows], Recipe]
    save: Save
    totals: Totals | None
    narrow: Callable[[Tensor], Any] | None  # tokens travel as it makes them, and are kept so

    def recipe(self, part: Part) -> Recipe:
        """Return the recipe for the part's rows."""
        ids = self.expert_ids[part.rows]
        counts = count_choices(ids, len(self.tokens_per_expert))
        return self.recipes(plan(ids, counts, self.activation, self.trip.num_choices(part)))

    def all_rows(self) -> Rows:
        """Return all rows in the order they have when received by rank: expert-major, stable."""
        choices, size = self.expert_ids.shape[1], max(self.expert_ids.numel(), 1)
        by_rank = self.expert_ids.roll(self.trip.shift, 0)
        num_rows = self.trip.num_choices()
        rows = plan(by_rank, self.tokens_per_expert, self.activation, num_rows)
        order = (rows.order - self.trip.shift * choices) % size
        return replace(rows, order=order, place=rows.place.roll(-self.trip.shift, 0))


class ChunkedExperts(torch.autograd.Function):
    """outgoing [P, H], probs, weights [e, out, in] -> [P, H], come home.

    `probs` are those whose gradients are wanted: of the rows received, or of the rows sent where
    all ranks get them.
    """

    @staticmethod
    def forward(
        ctx: Any, outgoing: Tensor, probs: Tensor, fc1: Tensor, fc2: Tensor, call: Call
    ) -> Tensor:
        trip = call.trip
        sent = outgoing if call.narrow is None else call.narrow(outgoing)
        arrivals = set_out(trip, sent)
        recipes = {part: call.recipe(part) for part in trip.parts}
        kept, held, homes = {}, {}, {}

        def first(part: Part) -> Tensor:
            came = arrivals[part].wait()
            tokens = recipes[part].keep(came) if call.narrow is None else came
            # The swapped rows are borrowed, or the own are a view of all that were sent.
            if tokens is came and bool(part.distances) == trip.to_all:
                tokens = whole_of(type(came), [tensor.clone() for tensor in parts_of(came)])
            kept[part] = tokens
            hidden = recipes[part].first(tokens, fc1)
            held[part] = hold(recipes[part], hidden, call.save)
            return hidden

        def second(part: Part, hidden: Tensor) -> None:
            output = recipes[part].second(hidden, call.probs[part.rows], fc2)
            homes[part] = trip.home([output.to(outgoing.dtype)], part)

        own = first(trip.own)
        for part in trip.others:
            second(part, first(part))
        second(trip.own, own)
        ctx.call, ctx.recipes = call, [recipes[part] for part in trip.parts]
        records = [by_part[part] for by_part in (kept, held) for part in trip.parts]
        _save(ctx, (call.probs, fc1, fc2), records)
        return collected(trip, homes)[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        call: Call = ctx.call
        trip, (probs, fc1, fc2), records = call.trip, *_saved(ctx)
        kept, held = records[: len(trip.parts)], records[len(trip.parts) :]
        arrivals = set_out(trip, grads[0].contiguous())
        recipe = call.recipes(call.all_rows())
        sums = (AtOnce if trip.to_all else PartByPart)(trip, recipe, fc1, grads[0].dtype)
        came, incoming = [], []
        for part, own, tokens, hidden in zip(trip.parts, ctx.recipes, kept, held, strict=True):
            came.append(arrivals[part].wait())
            incoming.append(own.incoming(came[-1]))
            if hidden is None:
                hidden = own.first(tokens, fc1)
            aimed = call.recipes(sums.aimed(part, own.rows))
            d_hidden, active, d_probs = aimed.hidden_grads(
                incoming[-1], hidden, probs[part.rows], fc2
            )
            sums.add(part, own, d_hidden, active, d_probs.to(probs.dtype))
        d_hidden, active = sums.finish()
        into = take(call.totals)
        d_fc2 = recipe.fc2_grads(recipe.all_incoming(came, incoming), active, into[1])
        d_fc1 = recipe.fc1_grads(d_hidden, kept if recipe.takes_pieces else joined(kept), into[0])
        weights = delivered(d_fc1, fc1), delivered(d_fc2, fc2)
        return *sums.came_home(), *weights, None


class ThereAndBack(torch.autograd.Function):
    """Rows to the other ranks and home as they are; ones go home as gradients of `probs`."""

    @staticmethod
    def forward(ctx: Any, outgoing: Tensor, probs: Tensor, trip: Trip) -> Tensor:
        ctx.trip, ctx.choices = trip, probs.shape[1]
        homes = {p: trip.home([came.wait()], p) for p, came in set_out(trip, outgoing).items()}
        return collected(trip, homes)[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        homes = {}
        for part, pending in set_out(ctx.trip, grads[0].contiguous()).items():
            came = pending.wait()
            beside = came.new_ones(len(came), ctx.choices, dtype=torch.float32)
            homes[part] = ctx.trip.home([came, beside], part)
        hidden, probs = collected(ctx.trip, homes)
        return hidden, probs, None


def _save(ctx: Any, tensors: tuple[Tensor, ...], records: list[Any]) -> None:
    """Keep `tensors`, and records of tensors, for the backward."""
    ctx.kinds = [(type(record), len(parts_of(record))) for record in records]
    ctx.save_for_backward(*tensors, *(t for record in records for t in parts_of(record)))


def _saved(ctx: Any) -> tuple[list[Tensor], list[Any]]:
    """Return what `_save` was given."""
    saved = list(ctx.saved_tensors)
    records = []
    for kind, count in reversed(ctx.kinds):
        first = len(saved) - count
        records.append(whole_of(kind, saved[first:]))
        del saved[first:]
    return saved, records[::-1]
