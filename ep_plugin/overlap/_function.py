"""Exchange, experts and exchange back as one function of its own backward, part by part.

The mathematics are those of `fused_experts`: a `Recipe` for the rows of each part, and one for all
rows, in the order that one after another would give them, for the weight gradients; so every result
has the same bits. What that costs beside `FusedExperts`, in bytes of device memory traffic for a
row of the experts, b bytes wide in what weight gradients read (2, or 1 for rowwise): with bf16 the
gradients of the output are spread a second time, 2 H b; with FP8 what is kept of tokens and of
gradients is joined, 2 H b each for a token received; and where token gradients go home part by
part, the activation and the gradients of the pre-activations are moved once, 6 F b (gated).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ep_plugin.config import Save
from ep_plugin.contracts import Pending
from ep_plugin.fused_experts import Recipe, Totals, delivered, saved, take
from ep_plugin.kernels import Rows, Target, plan
from ep_plugin.overlap._parts import Part, Trip
from ep_plugin.permute import count_choices
from ep_plugin.records import joined, parts_of, whole_of


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
        arrivals = _set_out(trip, sent)
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
            held[part] = saved(recipes[part], hidden, call.save)
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
        return _collected(trip, homes)[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        call: Call = ctx.call
        trip, (probs, fc1, fc2), records = call.trip, *_saved(ctx)
        kept, held = records[: len(trip.parts)], records[len(trip.parts) :]
        arrivals = _set_out(trip, grads[0].contiguous())
        recipe = call.recipes(call.all_rows())
        sums = (_AtOnce if trip.to_all else _PartByPart)(trip, recipe, fc1, grads[0].dtype)
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
        homes = {p: trip.home([came.wait()], p) for p, came in _set_out(trip, outgoing).items()}
        return _collected(trip, homes)[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        homes = {}
        for part, pending in _set_out(ctx.trip, grads[0].contiguous()).items():
            came = pending.wait()
            beside = came.new_ones(len(came), ctx.choices, dtype=torch.float32)
            homes[part] = ctx.trip.home([came, beside], part)
        hidden, probs = _collected(ctx.trip, homes)
        return hidden, probs, None


class _PartByPart:
    """Token gradients travel home as soon as a part has them; all else is joined behind it."""

    def __init__(self, trip: Trip, recipe: Recipe, fc1: Tensor, dtype: torch.dtype) -> None:
        self.trip, self.recipe, self.fc1, self.dtype = trip, recipe, fc1, dtype
        self.homes: dict[Part, Pending[list[Tensor]]] = {}
        self.d_probs: dict[Part, Tensor] = {}
        self.wholes: list[Any] = []  # gradients of pre-activations, activation

    def at(self, part: Part, rows: Rows) -> Tensor:
        """Return where among all rows those of the part are: [R] int32."""
        return self.recipe.rows.place[part.rows].flatten()[rows.order]

    def aimed(self, part: Part, rows: Rows) -> Rows:
        """Return the part's `rows`, with where the two matrices are to be written."""
        return rows

    def add(self, part: Part, recipe: Recipe, d_hidden: Any, active: Any, d_probs: Tensor) -> None:
        """Take what the part's rows gave, by its own recipe."""
        d_tokens = recipe.token_grads(d_hidden, self.fc1)
        self.homes[part] = self.trip.home([d_tokens.to(self.dtype)], part)
        self.d_probs[part] = d_probs
        if not self.wholes:
            self.wholes = [self._empty(d_hidden), self._empty(active)]
        at, ends = self.at(part, recipe.rows).unsqueeze(1), self.recipe.rows.ends
        for whole, matrix in zip(self.wholes, (d_hidden, active), strict=True):
            for into, piece in zip(parts_of(whole), parts_of(matrix), strict=True):
                rows = _matrix(_bytes(piece))
                recipe.rows.ops.spread_rows(rows, at, ends, into=_matrix(_bytes(into)))

    def finish(self) -> list[Any]:
        """Return the matrices of all rows; token gradients are on their way home."""
        return self.wholes

    def came_home(self) -> tuple[Tensor, Tensor]:
        """Return the gradients of the rows sent, and of the probabilities that are wanted."""
        d_probs = torch.cat([self.d_probs[part] for part in self.trip.parts])
        return _collected(self.trip, self.homes)[0], d_probs

    def _empty(self, like: Any) -> Any:
        count = len(self.recipe.rows.order)
        return whole_of(type(like), [t.new_empty(count, *t.shape[1:]) for t in parts_of(like)])


class _AtOnce(_PartByPart):
    """Parts write rows of the same matrices; token gradients come last, of all rows together.

    Nothing is joined, and travel is hidden by the weight gradients: enough where a link is fast.
    """

    def aimed(self, part: Part, rows: Rows) -> Rows:
        num_rows = len(self.recipe.rows.order)
        return replace(rows, target=Target(self.at(part, rows), num_rows, self.wholes or None))

    def add(self, part: Part, recipe: Recipe, d_hidden: Any, active: Any, d_probs: Tensor) -> None:
        self.wholes, self.d_probs[part] = [d_hidden, active], d_probs

    def finish(self) -> list[Any]:
        d_tokens = self.recipe.token_grads(self.wholes[0], self.fc1).to(self.dtype)
        for part in self.trip.parts:
            rows = [d_tokens[part.rows], self.d_probs[part]]
            self.homes[part] = self.trip.home(rows, part)
        return self.wholes

    def came_home(self) -> tuple[Tensor, Tensor]:
        d_tokens, d_probs = _collected(self.trip, self.homes)
        return d_tokens, d_probs


def _collected(trip: Trip, homes: Mapping[Part, Pending[list[Tensor]]]) -> list[Tensor]:
    """Return what came home with all parts, as it was packed."""
    rows = {part: home.wait() for part, home in homes.items()}
    number = len(next(iter(rows.values())))
    return [trip.collected({part: came[i] for part, came in rows.items()}) for i in range(number)]


def _matrix(tensor: Tensor) -> Tensor:
    return tensor.unsqueeze(1) if tensor.dim() == 1 else tensor


def _set_out(trip: Trip, source: Any) -> dict[Part, Pending[Any]]:
    """Start all of the way out for `source` [P, H], or a record of it; the network's part first."""
    sources = parts_of(source)

    def away(part: Part) -> Pending[Any]:
        started = trip.away([_bytes(tensor) for tensor in sources], part)

        def wait() -> Any:
            came = zip(started.wait(), sources, strict=True)
            return whole_of(type(source), [rows.view(like.dtype) for rows, like in came])

        return Pending(wait)

    return {part: away(part) for part in (*trip.others, trip.own)}


def _bytes(tensor: Tensor) -> Tensor:
    """Return e4m3 as bytes, which every backend can send."""
    return tensor.view(torch.uint8) if tensor.itemsize == 1 else tensor


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
