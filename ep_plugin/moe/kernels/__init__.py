"""Fused kernels in Triton, for CUDA tensors, beside plain-torch twins that run anywhere."""

from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from ep_plugin.moe.e4m3 import BLOCK


def select(tensor: Tensor) -> ModuleType:
    """Return `kernels._on_cuda` for a CUDA tensor, else its twin, which has the same functions."""
    return import_module(f"ep_plugin.moe.kernels.{'_on_cuda' if tensor.is_cuda else '_on_any'}")


TILE = BLOCK  # rows; in weight gradients by blocks they share scales
Narrow = Literal["rows", "blocks"]  # e4m3 with one scale for each row, or each 128 columns of it


@dataclass(frozen=True)
class Tiles:
    """Each expert's rows in tiles of 128, the last of an expert shorter."""

    expert: Tensor  # [n] int32, whose rows; -1 behind the last tile
    row: Tensor  # [n] int32, the first of them
    ends: Tensor  # [e] int32, the tile behind each expert's last


@dataclass(frozen=True)
class Target:
    """Larger matrices that some rows are part of."""

    at: Tensor  # [R] int32, the row there of each row
    num_rows: int  # there
    matrices: Any = None  # None before the first rows are written


@dataclass(frozen=True)
class Rows:
    """The rows of this rank's experts, and the kernels on them; the same in the backward."""

    order: Tensor  # [R] int32 flat choice of each row
    place: Tensor  # [N, C] int32 row of each choice
    ends: Tensor  # [e] int32 row behind each expert's last
    activation: str
    ops: Any  # kernels.experts, or its twin
    target: Target | None = None  # where `activate_backward` writes, unless matrices of its own

    @cached_property
    def tiles(self) -> Tiles:
        """The rows as products in e4m3 take them, and rounding by blocks."""
        tiles: Tiles = self.ops.plan_tiles(len(self.order), self.ends)
        return tiles

    def spread(self, tokens: Tensor | list[Tensor]) -> Tensor:
        """Return the token [R, X] of each row, of `tokens` [N, X], whole or in pieces."""
        pieces = [tokens] if isinstance(tokens, Tensor) else tokens
        places = torch.split(self.place, [len(piece) for piece in pieces])
        rows: Tensor | None = None
        for piece, place in zip(pieces, places, strict=True):
            rows = self.ops.spread_rows(piece, place, self.ends, len(self.order), rows)
        assert rows is not None
        return rows

    def sum(self, rows: Tensor) -> Tensor:
        """Return the sum [N, X] over each token's `rows` [R, X]."""
        summed: Tensor = self.ops.sum_rows(rows, self.place, self.ends)
        return summed

    def wgrad(self, gemm: Any, grads: Tensor, rows: Tensor, into: Tensor | None) -> Tensor | None:
        """Return the weight gradient [e, b, a] by `gemm`, or add it to `into` and return None.

        `gemm` is a `GroupedGemm`, `grads` [R, b], `rows` [R, a], `into` [e, b, a] fp32.
        """
        if into is None:
            gradient: Tensor = gemm.wgrad(grads, rows, self.ends)
            return gradient
        aligned = grads.shape[1] % 8 == rows.shape[1] % 8 == 0
        if grads.dtype == torch.bfloat16 and aligned:
            self.ops.add_wgrad(into, grads, rows, self.ends)
        else:
            into += gemm.wgrad(grads, rows, self.ends)
        return None

    def activate(self, hidden: Tensor, probs: Tensor, narrow: Narrow | None = None) -> Any:
        """Return activation times probability [R, F]; see `kernels.experts`."""
        return self.ops.activate(hidden, probs, self.order, self.ends, self.activation, narrow)

    def activate_backward(
        self, grads: Tensor, hidden: Any, probs: Tensor, narrow: Narrow | None = None
    ) -> tuple[Any, Any, Tensor]:
        """Return gradients of `hidden`, the activation again, gradients of `probs`."""
        found: tuple[Any, Any, Tensor] = self.ops.activate_backward(
            grads, hidden, probs, self.order, self.ends, self.activation, narrow, self.target
        )
        return found


def plan(
    expert_ids: Tensor,
    tokens_per_expert: Tensor,
    activation: str,
    num_rows: int | None = None,
) -> Rows:
    """Return the rows for `expert_ids` [N, C] and their number for each expert [e].

    R is `num_rows`, the choices that are present, where the host knows them; else N * C.
    """
    ends = tokens_per_expert.cumsum(0, dtype=torch.int32)
    ops = select(expert_ids)
    order, place = ops.sort_choices(expert_ids, ends)
    return Rows(order[:num_rows], place, ends, activation, ops)
