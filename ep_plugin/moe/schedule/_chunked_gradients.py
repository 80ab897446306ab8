"""What the parts' rows give in the backward, for all rows: in two orders, to the same bits."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ep_plugin.moe.experts.fused import Recipe
from ep_plugin.moe.interfaces import Pending
from ep_plugin.moe.kernels import Rows, Target
from ep_plugin.moe.records import parts_of, whole_of
from ep_plugin.moe.schedule._trip import Part, Trip, as_bytes, collected


class PartByPart:
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
                rows = _matrix(as_bytes(piece))
                recipe.rows.ops.spread_rows(rows, at, ends, into=_matrix(as_bytes(into)))

    def finish(self) -> list[Any]:
        """Return the matrices of all rows; token gradients are on their way home."""
        return self.wholes

    def came_home(self) -> tuple[Tensor, Tensor]:
        """Return the gradients of the rows sent, and of the probabilities that are wanted."""
        d_probs = torch.cat([self.d_probs[part] for part in self.trip.parts])
        return collected(self.trip, self.homes)[0], d_probs

    def _empty(self, like: Any) -> Any:
        count = len(self.recipe.rows.order)
        return whole_of(type(like), [t.new_empty(count, *t.shape[1:]) for t in parts_of(like)])


class AtOnce(PartByPart):
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
        d_tokens, d_probs = collected(self.trip, self.homes)
        return d_tokens, d_probs


def _matrix(tensor: Tensor) -> Tensor:
    return tensor.unsqueeze(1) if tensor.dim() == 1 else tensor
