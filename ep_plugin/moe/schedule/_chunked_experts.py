"""Exchange, experts and exchange back as one function of its own backward, leg by leg.

The mathematics are those of `experts/fused.py`: a `Recipe` for the rows of each leg, and one for
all rows, in the order that one after another would give them, for the weight gradients; so every
result has the same bits. What that costs beside `FusedExperts`, in bytes of device memory traffic
for a row of the experts, b bytes wide in what weight gradients read (2, or 1 for rowwise): with
bf16 the gradients of the output are spread a second time, 2 H b; with FP8 what is kept of tokens
and of gradients is joined, 2 H b each for a token received; and where token gradients go home leg
by leg, the activation and the gradients of the pre-activations are moved once, 6 F b (gated).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ep_plugin.moe.config import Save
from ep_plugin.moe.experts.fused import (
    Recipe,
    Totals,
    delivered,
    hold,
    joined,
    parts_of,
    take,
    whole_of,
)
from ep_plugin.moe.rows import ExpertRows, count_choices, expert_rows
from ep_plugin.moe.schedule._chunked_gradients import AtOnce, LegByLeg
from ep_plugin.moe.schedule._trip import Leg, Trip, collected, set_out


@dataclass(frozen=True)
class Call:
    """One call of the function, beside its differentiable tensors."""

    trip: Trip
    expert_ids: Tensor  # [N, C] of the rows received, by distance
    probs: Tensor  # [N, C], likewise
    tokens_per_expert: Tensor  # [e]
    activation: str
    recipes: Callable[[ExpertRows], Recipe]
    save: Save
    totals: Totals | None
    wire_format: Callable[[Tensor], Any] | None  # tokens travel as it makes them, and are kept so

    def recipe(self, leg: Leg) -> Recipe:
        """Return the recipe for the leg's rows."""
        ids = self.expert_ids[leg.rows]
        counts = count_choices(ids, len(self.tokens_per_expert))
        num_rows = self.trip.num_choices(leg)
        return self.recipes(expert_rows(ids, counts, self.activation, num_rows))

    def all_rows(self) -> ExpertRows:
        """Return all rows in the order they have when received by rank: expert-major, stable."""
        choices, size = self.expert_ids.shape[1], max(self.expert_ids.numel(), 1)
        by_rank = self.expert_ids.roll(self.trip.shift, 0)
        num_rows = self.trip.num_choices()
        rows = expert_rows(by_rank, self.tokens_per_expert, self.activation, num_rows)
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
        sent = outgoing if call.wire_format is None else call.wire_format(outgoing)
        arrivals = set_out(trip, sent)
        recipes = {leg: call.recipe(leg) for leg in trip.legs}
        kept, held, homes = {}, {}, {}

        def first(leg: Leg) -> Tensor:
            came = arrivals[leg].wait()
            tokens = recipes[leg].keep(came) if call.wire_format is None else came
            # The swapped rows are borrowed, or the own are a view of all that were sent.
            if tokens is came and bool(leg.distances) == trip.to_all:
                tokens = whole_of(type(came), [tensor.clone() for tensor in parts_of(came)])
            kept[leg] = tokens
            hidden = recipes[leg].first(tokens, fc1)
            held[leg] = hold(recipes[leg], hidden, call.save)
            return hidden

        def second(leg: Leg, hidden: Tensor) -> None:
            output = recipes[leg].second(hidden, call.probs[leg.rows], fc2)
            homes[leg] = trip.home([output.to(outgoing.dtype)], leg)

        own = first(trip.own)
        for leg in trip.others:
            second(leg, first(leg))
        second(trip.own, own)
        ctx.call, ctx.recipes = call, [recipes[leg] for leg in trip.legs]
        records = [by_leg[leg] for by_leg in (kept, held) for leg in trip.legs]
        _save(ctx, (call.probs, fc1, fc2), records)
        return collected(trip, homes)[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        call: Call = ctx.call
        trip, (probs, fc1, fc2), records = call.trip, *_saved(ctx)
        kept, held = records[: len(trip.legs)], records[len(trip.legs) :]
        arrivals = set_out(trip, grads[0].contiguous())
        recipe = call.recipes(call.all_rows())
        sums = (AtOnce if trip.to_all else LegByLeg)(trip, recipe, fc1, grads[0].dtype)
        came, incoming = [], []
        for leg, own, tokens, hidden in zip(trip.legs, ctx.recipes, kept, held, strict=True):
            came.append(arrivals[leg].wait())
            incoming.append(own.incoming(came[-1]))
            if hidden is None:
                hidden = own.first(tokens, fc1)
            aimed = call.recipes(sums.aimed(leg, own.rows))
            d_hidden, active, d_probs = aimed.hidden_grads(
                incoming[-1], hidden, probs[leg.rows], fc2
            )
            sums.add(leg, own, d_hidden, active, d_probs.to(probs.dtype))
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
        for leg, pending in set_out(ctx.trip, grads[0].contiguous()).items():
            came = pending.wait()
            beside = came.new_ones(len(came), ctx.choices, dtype=torch.float32)
            homes[leg] = ctx.trip.home([came, beside], leg)
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
