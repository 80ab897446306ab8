"""Exchange, experts and exchange back as one function of its own backward, part by part.

The mathematics are those of `fused_experts`: a `Recipe` for the rows of each part, and one for all
rows, in the order that one after another would give them, for the weight gradients; so every result
has the same bits. What that costs beside `FusedExperts`, in bytes of device memory traffic for a
row of the experts, b bytes wide in what weight gradients read (2, or 1 for rowwise): the activation
and the gradients of the pre-activations are moved once, 6 F b (gated); with bf16 the gradients of
the output are spread a second time, 2 H b; with FP8 the tokens are kept part by part and then
joined, and rowwise quantises the gradients of the output twice, about 2 H and 3 H for each token
received, which dispatch_dedup makes fewer than rows.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ep_plugin.config import Save
from ep_plugin.contracts import Pending
from ep_plugin.fused_experts import (
    Recipe,
    Totals,
    delivered,
    parts_of,
    take,
    through,
    whole_of,
)
from ep_plugin.kernels import Rows, plan
from ep_plugin.overlap._parts import Part, Trip
from ep_plugin.permute import count_choices


@dataclass(frozen=True)
class Call:
    """One call of the function, beside its differentiable tensors."""

    trip: Trip
    expert_ids: Tensor  # [N, C] of the rows received, by distance
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
        return self.recipes(plan(ids, counts, self.activation))

    def all_rows(self) -> Rows:
        """Return all rows in the order they have when received by rank: expert-major, stable."""
        choices, size = self.expert_ids.shape[1], max(self.expert_ids.numel(), 1)
        by_rank = self.expert_ids.roll(self.trip.shift, 0)
        rows = plan(by_rank, self.tokens_per_expert, self.activation)
        order = (rows.order - self.trip.shift * choices) % size
        return replace(rows, order=order, place=rows.place.roll(-self.trip.shift, 0))


class ChunkedExperts(torch.autograd.Function):
    """outgoing [P, H], probs [N, C] by distance, weights [e, out, in] -> [P, H], come home."""

    @staticmethod
    def forward(
        ctx: Any, outgoing: Tensor, probs: Tensor, fc1: Tensor, fc2: Tensor, call: Call
    ) -> Tensor:
        trip, probs = call.trip, probs.contiguous()
        sent = outgoing if call.narrow is None else call.narrow(outgoing)
        incoming, arrivals = _set_out(trip, sent)
        returned = torch.empty_like(outgoing)
        first, second = trip.own
        recipes, kept, held, homes = {}, {}, {}, []
        for part in (first, *trip.others, second):
            recipe = recipes[part] = call.recipe(part)
            _wait(arrivals[part])
            came = _rows_of(incoming, part)
            kept[part] = recipe.keep(came) if call.narrow is None else came
            output, held[part] = through(recipe, kept[part], probs[part.rows], fc1, fc2, call.save)
            homes.append(trip.home(output.to(outgoing.dtype), returned, part))
        for home in homes:
            home.wait()
        whole = incoming
        if call.narrow is None:
            whole = _joined([kept[part] for part in trip.parts], incoming)
        ctx.call, ctx.recipes = call, [recipes[part] for part in trip.parts]
        _save(ctx, (probs, fc1, fc2), [whole, *(held[part] for part in trip.parts)])
        return returned

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        call: Call = ctx.call
        trip, (probs, fc1, fc2), (kept, *held) = call.trip, *_saved(ctx)
        incoming, arrivals = _set_out(trip, grads[0].contiguous())
        returned = torch.empty_like(grads[0], memory_format=torch.contiguous_format)
        rows = call.all_rows()
        d_hidden, active, d_probs, homes = _Sorted(rows), _Sorted(rows), [], []
        for part, recipe, hidden in zip(trip.parts, ctx.recipes, held, strict=True):
            _wait(arrivals[part])
            if hidden is None:
                hidden = recipe.first(_rows_of(kept, part), fc1)
            d_part, active_part, d_probs_part = recipe.hidden_grads(
                recipe.incoming(incoming[part.rows]), hidden, probs[part.rows], fc2
            )
            d_tokens = recipe.token_grads(d_part, fc1)
            homes.append(trip.home(d_tokens.to(returned.dtype), returned, part))
            d_hidden.add(d_part, part, recipe.rows)
            active.add(active_part, part, recipe.rows)
            d_probs.append(d_probs_part)
        recipe = call.recipes(rows)
        into = take(call.totals)
        d_fc2 = delivered(recipe.fc2_grads(recipe.incoming(incoming), active.value(), into[1]), fc2)
        d_fc1 = delivered(recipe.fc1_grads(d_hidden.value(), kept, into[0]), fc1)
        for home in homes:
            home.wait()
        return returned, torch.cat(d_probs).to(probs.dtype), d_fc1, d_fc2, None


class _Sorted:
    """A matrix of all rows in the order of `rows`, put together of the parts' rows."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.kind: Any = None
        self.tensors: list[Tensor] = []

    def add(self, value: Any, part: Part, rows: Rows) -> None:
        """Put the part's rows, in the order of its own `rows`, where they belong."""
        if self.kind is None:
            self.kind, count = type(value), len(self.rows.order)
            self.tensors = [t.new_empty(count, *t.shape[1:]) for t in parts_of(value)]
        target = self.rows.place[part.rows].flatten()[rows.order].long()
        for whole, tensor in zip(self.tensors, parts_of(value), strict=True):
            _words(whole).index_copy_(0, target, _words(tensor))

    def value(self) -> Any:
        """Return the whole matrix; it is no longer held here."""
        tensors, self.tensors = self.tensors, []
        return whole_of(self.kind, tensors)


def _words(tensor: Tensor) -> Tensor:
    """Return a matrix as one of 8 byte words where its rows are made of such: faster to move."""
    is_wide = tensor.dim() == 2 and tensor.shape[1] * tensor.itemsize % 8 == 0
    return tensor.view(torch.int64) if is_wide else tensor


def _set_out(trip: Trip, source: Any) -> tuple[Any, dict[Part, list[Pending[None]]]]:
    """Start all of the way out for `source` [P, H], or a record of it; the network's part first.

    Returns what is received [N, H], of the same kind, and each part's arrival.
    """
    sources = parts_of(source)
    targets = [tensor.new_empty(trip.num_received, *tensor.shape[1:]) for tensor in sources]
    arrivals = {
        part: [trip.away(_bytes(s), _bytes(t), part) for s, t in zip(sources, targets, strict=True)]
        for part in (*trip.others, *trip.own)
    }
    return whole_of(type(source), targets), arrivals


def _wait(arrivals: list[Pending[None]]) -> None:
    for arrival in arrivals:
        arrival.wait()


def _bytes(tensor: Tensor) -> Tensor:
    """Return e4m3 as bytes, which every backend can send."""
    return tensor.view(torch.uint8) if tensor.itemsize == 1 else tensor


def _joined(pieces: list[Any], incoming: Tensor) -> Any:
    """Return what the parts keep of `incoming` as one: itself where they keep it as it is."""
    if isinstance(pieces[0], Tensor) and pieces[0].dtype == incoming.dtype:
        return incoming
    tensors = [torch.cat(same) for same in zip(*map(parts_of, pieces), strict=True)]
    return whole_of(type(pieces[0]), tensors)


def _rows_of(kept: Any, part: Part) -> Any:
    return whole_of(type(kept), [tensor[part.rows] for tensor in parts_of(kept)])


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
