"""Exchange, experts and exchange back as one autograd function, leg by leg.

A leg is the rows from some of the ranks (see `_trip.py`). The mathematics are those of
`experts/fused.py`. There is one `Recipe` for the rows of each leg. Another one, for all rows in the
order of schedule `serial`, makes the weight gradients. So every result has the bits of `serial`.

A leg with more rows than its share of a rank's capacity is computed in passes. Then the backward
makes the weight gradients of each leg with its others: they are summed over legs in fp32, and no
matrix is for more rows than a pass has.

What this costs more than `FusedExperts`, as device memory traffic in bytes. Weight gradients read
values of b bytes (2 in bf16, 1 in e4m3):

- bf16: gradients of the output are copied to rows a second time, 2 H b for each row of the experts
- FP8: kept tokens and gradients are concatenated, 2 H b each for every token received
- token gradients that travel leg by leg: the activation and the gradients of the pre-activations
  are copied once, 6 F b for each row (gated)
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ep_plugin.moe.experts.fused import (
    Backward,
    Keep,
    Recipe,
    Totals,
    WeightSums,
    joined,
    parts_of,
    sums,
    whole_of,
)
from ep_plugin.moe.interfaces import Pending
from ep_plugin.moe.rows import ExpertRows, count_choices, expert_rows
from ep_plugin.moe.schedule._chunked_gradients import AtOnce, LegByLeg
from ep_plugin.moe.schedule._trip import Leg, Trip, collected, set_out
from ep_plugin.moe.watch.place import Phase, enter_other, here


@dataclass(frozen=True)
class Call:
    """The arguments of one call of `ChunkedExperts` that need no gradients."""

    trip: Trip
    expert_ids: Tensor  # [N, C] local experts of the tokens received, by distance; -1 = none
    probs: Tensor  # [N, C] their routing weights, by distance
    tokens_per_expert: Tensor  # [e] int64
    activation: str
    recipes: Callable[[ExpertRows], Recipe]
    keep: dict[Leg, Keep]
    totals: Totals | None
    wire_format: Callable[[Tensor], Any] | None  # to e4m3, sent and kept so; None: as they are

    def recipe(self, leg: Leg) -> Recipe:
        """Return the recipe for the leg's rows."""
        ids = self.expert_ids[leg.rows]
        counts = count_choices(ids, len(self.tokens_per_expert))
        num_rows = self.trip.num_choices(leg)
        return self.recipes(expert_rows(ids, counts, self.activation, num_rows))

    def all_rows(self) -> ExpertRows:
        """Return the rows of all legs in the order of `serial`: by expert, then by source rank."""
        choices, size = self.expert_ids.shape[1], max(self.expert_ids.numel(), 1)
        by_rank = self.expert_ids.roll(self.trip.shift, 0)
        num_rows = self.trip.num_choices()
        rows = expert_rows(by_rank, self.tokens_per_expert, self.activation, num_rows)
        order = (rows.order - self.trip.shift * choices) % size
        return replace(rows, order=order, place=rows.place.roll(-self.trip.shift, 0))


class ChunkedExperts(torch.autograd.Function):
    """outgoing [P, H], probs, weights [e, out, in] -> experts' outputs for the rows sent [P, H].

    `probs` are the routing weights that get gradients: those of the rows received, or those of the
    rows sent if every row goes to all ranks.
    """

    @staticmethod
    def forward(
        ctx: Any, outgoing: Tensor, probs: Tensor, fc1: Tensor, fc2: Tensor, call: Call
    ) -> Tensor:
        trip, ctx.place = call.trip, here.code
        sent = outgoing if call.wire_format is None else call.wire_format(outgoing)
        arrivals = set_out(trip, sent)
        recipes = {leg: call.recipe(leg) for leg in trip.legs}
        passes = {leg: call.keep[leg].passes(recipes[leg]) for leg in trip.legs}
        kept, held, homes = {}, {}, {}

        def first(leg: Leg) -> tuple[Any, Tensor]:
            came = arrivals[leg].wait()
            tokens = recipes[leg].keep(came) if call.wire_format is None else came
            # Cloned: they may lie in a shared buffer, or be a view of all rows sent.
            if tokens is came and bool(leg.distances) == trip.to_all:
                tokens = whole_of(type(came), [tensor.clone() for tensor in parts_of(came)])
            kept[leg], operand = tokens, recipes[leg].operand(tokens)
            hidden = passes[leg][0].first(operand, fc1)
            held[leg] = call.keep[leg].hold(passes[leg][0], hidden)
            return operand, hidden

        def second(leg: Leg, operand: Any, hidden: Tensor) -> None:
            probs, (one, *later) = call.probs[leg.rows], passes.pop(leg)
            into = sums(one, fc1, outgoing.dtype) if later else None
            output = one.second(hidden, probs, fc2, into)
            del hidden
            for each in later:
                each.second(each.first(operand, fc1), probs, fc2, into)
            homes[leg] = trip.home([output.to(outgoing.dtype)], leg)

        own = [first(trip.own)]
        for leg in trip.others:
            second(leg, *first(leg))
        second(trip.own, *own.pop())
        enter_other(ctx.place, Phase.COMBINE)
        ctx.call, ctx.recipes = call, [recipes[leg] for leg in trip.legs]
        records = [by_leg[leg] for by_leg in (kept, held) for leg in trip.legs]
        _save(ctx, (call.probs, fc1, fc2), records)
        return collected(trip, homes)[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        call: Call = ctx.call
        trip, (probs, fc1, fc2), records = call.trip, *_saved(ctx)
        enter_other(ctx.place, Phase.BACKWARD_OF_COMBINE)
        arrivals = set_out(trip, grads[0].contiguous())
        several = any(map(Keep.several, (call.keep[leg] for leg in trip.legs), ctx.recipes))
        weights = WeightSums(call.totals, fc1, fc2, several)
        kept, held = records[: len(trip.legs)], records[len(trip.legs) :]
        legs = [
            (leg, Backward(recipe, call.keep[leg], tokens, hidden, probs[leg.rows], weights))
            for leg, recipe, tokens, hidden in zip(trip.legs, ctx.recipes, kept, held, strict=True)
        ]
        way = _weights_by_leg if several else _weights_last
        home = way(call, legs, arrivals, grads[0].dtype, ctx.place)
        enter_other(ctx.place, Phase.PAST_BACKWARD)
        return *home, *weights.delivered(), None


def _weights_last(
    call: Call,
    legs: list[tuple[Leg, Backward]],
    arrivals: dict[Leg, Pending[Any]],
    dtype: torch.dtype,
    place: int,
) -> tuple[Tensor, Tensor]:
    """Return the gradients that came home; those of weights are computed for all legs at once."""
    trip, recipe, weights = call.trip, call.recipes(call.all_rows()), legs[0][1].weights
    found = (AtOnce if trip.to_all else LegByLeg)(trip, recipe, weights.fc1, dtype)
    incoming = []
    for leg, own in legs:
        incoming.append(own.recipe.incoming(arrivals[leg].wait()))
        aimed = call.recipes(found.aimed(leg, own.recipe.rows))
        arrived = aimed.arrived(incoming[-1])
        hidden = own.hidden()
        d_hidden, active, d_probs = aimed.hidden_grads(arrived, hidden, own.probs, weights.fc2)
        found.add(leg, own.recipe, d_hidden, active, d_probs.to(own.probs.dtype))
    enter_other(place, Phase.BACKWARD_OF_DISPATCH)
    d_hidden, active = found.finish()
    weights.add_fc2(recipe, recipe.all_arrived(incoming), active)
    kept = [own.kept for _, own in legs]
    weights.add_fc1(recipe, d_hidden, kept if recipe.takes_pieces else joined(kept))
    return found.came_home()


def _weights_by_leg(
    call: Call,
    legs: list[tuple[Leg, Backward]],
    arrivals: dict[Leg, Pending[Any]],
    dtype: torch.dtype,
    place: int,
) -> tuple[Tensor, Tensor]:
    """Return the gradients that came home; each leg adds those of weights, in passes."""
    trip, homes, probs = call.trip, {}, []
    for leg, own in legs:
        d_tokens, d_probs = own.run(arrivals[leg].wait())
        probs.append(d_probs.to(own.probs.dtype))
        sent = [d_tokens.to(dtype), probs[-1]]
        homes[leg] = trip.home(sent if trip.to_all else sent[:1], leg)
    enter_other(place, Phase.BACKWARD_OF_DISPATCH)
    came_home = collected(trip, homes)
    return came_home[0], came_home[1] if trip.to_all else torch.cat(probs)


class ThereAndBack(torch.autograd.Function):
    """Send rows to the other ranks and back unchanged; the gradients of `probs` are ones."""

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
    """Save `tensors`, and the tensors of `records`, for the backward."""
    ctx.kinds = [(type(record), len(parts_of(record))) for record in records]
    ctx.save_for_backward(*tensors, *(t for record in records for t in parts_of(record)))


def _saved(ctx: Any) -> tuple[list[Tensor], list[Any]]:
    """Return the tensors and the records that `_save` was given."""
    saved = list(ctx.saved_tensors)
    records = []
    for kind, count in reversed(ctx.kinds):
        first = len(saved) - count
        records.append(whole_of(kind, saved[first:]))
        del saved[first:]
    return saved, records[::-1]
