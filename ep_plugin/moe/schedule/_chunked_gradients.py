"""The gradients of all legs put together in the backward, in one of two orders.

`LegByLeg` sends token gradients home after each leg, `AtOnce` after all legs. The results have the
same bits.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ep_plugin.moe.experts.fused import Recipe, parts_of, whole_of
from ep_plugin.moe.interfaces import Pending
from ep_plugin.moe.kernels.types import Target
from ep_plugin.moe.rows import ExpertRows
from ep_plugin.moe.schedule._trip import Leg, Trip, as_bytes, collected


class LegByLeg:
    """Token gradients travel home as soon as a leg has computed them.

    Meanwhile the leg's other matrices are copied to their places among all rows.
    """

    def __init__(self, trip: Trip, recipe: Recipe, fc1: Tensor, dtype: torch.dtype) -> None:
        self.trip, self.recipe, self.fc1, self.dtype = trip, recipe, fc1, dtype
        self.homes: dict[Leg, Pending[list[Tensor]]] = {}
        self.d_probs: dict[Leg, Tensor] = {}
        self.wholes: list[Any] = []  # gradients of pre-activations, activation

    def at(self, leg: Leg, rows: ExpertRows) -> Tensor:
        """Return the index among all rows of each of the leg's rows: [R] int32."""
        return self.recipe.rows.place[leg.rows].flatten()[rows.order]

    def aimed(self, leg: Leg, rows: ExpertRows) -> ExpertRows:
        """Return the leg's `rows`, with the target of `activate_backward` set if it has one."""
        return rows

    def add(self, leg: Leg, recipe: Recipe, d_hidden: Any, active: Any, d_probs: Tensor) -> None:
        """Take the gradients and the activation of one leg; `recipe` is that of the leg."""
        d_tokens = recipe.token_grads(d_hidden, self.fc1)
        self.homes[leg] = self.trip.home([d_tokens.to(self.dtype)], leg)
        self.d_probs[leg] = d_probs
        if not self.wholes:
            self.wholes = [self._empty(d_hidden), self._empty(active)]
        at, ends = self.at(leg, recipe.rows).unsqueeze(1), self.recipe.rows.ends
        for whole, matrix in zip(self.wholes, (d_hidden, active), strict=True):
            for into, piece in zip(parts_of(whole), parts_of(matrix), strict=True):
                rows = _matrix(as_bytes(piece))
                recipe.rows.ops.spread_rows(rows, at, ends, into=_matrix(as_bytes(into)))

    def finish(self) -> list[Any]:
        """Return the gradients of pre-activations and the activation, of all rows.

        Token gradients are then on their way home.
        """
        return self.wholes

    def came_home(self) -> tuple[Tensor, Tensor]:
        """Wait; return the gradients of the rows sent [P, H] and of the `probs` that need them."""
        d_probs = torch.cat([self.d_probs[leg] for leg in self.trip.legs])
        return collected(self.trip, self.homes)[0], d_probs

    def _empty(self, like: Any) -> Any:
        count = len(self.recipe.rows.order)
        return whole_of(type(like), [t.new_empty(count, *t.shape[1:]) for t in parts_of(like)])


class AtOnce(LegByLeg):
    """All legs write into the same matrices; token gradients of all rows are computed last.

    Nothing is copied. Only the weight gradients hide the exchange, which is enough on a fast link.
    """

    def aimed(self, leg: Leg, rows: ExpertRows) -> ExpertRows:
        num_rows = len(self.recipe.rows.order)
        return replace(rows, target=Target(self.at(leg, rows), num_rows, self.wholes or None))

    def add(self, leg: Leg, recipe: Recipe, d_hidden: Any, active: Any, d_probs: Tensor) -> None:
        self.wholes, self.d_probs[leg] = [d_hidden, active], d_probs

    def finish(self) -> list[Any]:
        d_tokens = self.recipe.token_grads(self.wholes[0], self.fc1).to(self.dtype)
        for leg in self.trip.legs:
            rows = [d_tokens[leg.rows], self.d_probs[leg]]
            self.homes[leg] = self.trip.home(rows, leg)
        return self.wholes

    def came_home(self) -> tuple[Tensor, Tensor]:
        d_tokens, d_probs = collected(self.trip, self.homes)
        return d_tokens, d_probs


def _matrix(tensor: Tensor) -> Tensor:
    return tensor.unsqueeze(1) if tensor.dim() == 1 else tensor
