"""Which row each choice of a token is, sorted by expert or by rank; and the sum back.

For two choices of 3 tokens a b c that chose (E1 E0) (E0 -) (E2 E0), `-` meaning none:

    choice, flat [N*C]     0:aE1 1:aE0 2:bE0 3:b- 4:cE2 5:cE0
    order                  1 2 5 0 4 | 3                        (stable; absent choices go last)
    rows                   a b c a c | b                        E0: a b c   E1: a   E2: c
    place                  3 0 1 - 4 2                          row of each choice

Nothing waits for the device: there is a row for every choice, and those behind the last expert's
belong to absent ones and hold zeros after `permute`. Rows are moved by `kernels/move_rows.py` on
CUDA, by its twin `kernels/rows_torch.py` elsewhere.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ep_plugin.moe.kernels import rows_torch, select
from ep_plugin.moe.kernels.types import Scales, Target, Tiles


@dataclass(frozen=True)
class Rows:
    """Where each choice's row is, expert-major; R is N * C, or less where no row is absent's."""

    order: Tensor  # [R] int32 flat choice of each row
    place: Tensor  # [N, C] int32 row of each choice
    ends: Tensor  # [e] int32 row behind each expert's last
    exact: bool  # no row is an absent choice's

    @cached_property
    def ops(self) -> Any:
        """The kernels on them: `kernels._on_cuda`, or its twin."""
        return select(self.place)

    @cached_property
    def present(self) -> Tensor:
        """Whether each choice is present: [N, C] bool."""
        return self.place < self.ends[-1]


@dataclass(frozen=True)
class ExpertRows(Rows):
    """The rows of this rank's experts, and what is computed on them; the same in the backward."""

    activation: str
    target: Target | None = None  # where `activate_backward` writes, unless matrices of its own

    @cached_property
    def tiles(self) -> Tiles:
        """The rows as products in e4m3 take them, and rounding by blocks."""
        tiles: Tiles = self.ops.plan_tiles(self.order.shape[0], self.ends)
        return tiles

    def part(self, first: int, last: int) -> "ExpertRows":
        """Return the rows from `first` to before `last`, as rows of their own."""
        behind = last - first  # a place behind every row
        place = torch.where(self.place >= first, self.place - first, behind)
        ends = (self.ends - first).clamp(0, behind)
        return replace(self, order=self.order[first:last], place=place, ends=ends)

    def spread(self, tokens: Tensor | list[Tensor]) -> Tensor:
        """Return the token [R, X] of each row, of `tokens` [N, X], whole or in pieces."""
        rows: Tensor | None = None
        if isinstance(tokens, Tensor):
            rows = self.ops.spread_rows(tokens, self.place, self.ends, self.order.shape[0])
        else:
            places = torch.split(self.place, [len(piece) for piece in tokens])
            for piece, place in zip(tokens, places, strict=True):
                rows = self.ops.spread_rows(piece, place, self.ends, self.order.shape[0], rows)
        assert rows is not None
        return rows

    def sum(self, rows: Tensor, into: Tensor | None = None) -> Tensor:
        """Return the sum [N, X] over each token's `rows` [R, X]; with `into` [N, X] added there."""
        summed: Tensor = self.ops.sum_rows(rows, self.place, self.ends, into)
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

    def activate(self, hidden: Tensor, probs: Tensor, scales: Scales | None = None) -> Any:
        """Return activation times probability [R, F]; see `kernels.activation`."""
        return self.ops.activate(hidden, probs, self.order, self.ends, self.activation, scales)

    def activate_backward(
        self, grads: Tensor, hidden: Any, probs: Tensor, scales: Scales | None = None
    ) -> tuple[Any, Any, Tensor]:
        """Return gradients of `hidden`, the activation again, gradients of `probs`."""
        found: tuple[Any, Any, Tensor] = self.ops.activate_backward(
            grads, hidden, probs, self.order, self.ends, self.activation, scales, self.target
        )
        return found


def rows_of(expert_ids: Tensor, counts: Tensor, num_rows: int | None = None) -> Rows:
    """Return the rows for `expert_ids` [N, C], -1 = absent; `counts` [e] are of each expert.

    R is `num_rows`, the choices that are present, where the host knows them; else N * C.
    """
    order, place, ends = select(expert_ids).sort_choices(expert_ids, counts)
    if num_rows is None:
        return Rows(order, place, ends, exact=False)
    return Rows(order[:num_rows], place, ends, exact=True)


def expert_rows(
    expert_ids: Tensor, counts: Tensor, activation: str, num_rows: int | None = None
) -> ExpertRows:
    """Return `rows_of` the choices of this rank's experts, to be computed with `activation`."""
    rows = rows_of(expert_ids, counts, num_rows)
    return ExpertRows(rows.order, rows.place, rows.ends, rows.exact, activation)


def count_choices(expert_ids: Tensor, num_experts: int) -> Tensor:
    """Return how many of `expert_ids` [N, C] are each expert's, -1 for none's: [e] int64."""
    counted: Tensor = select(expert_ids).count_choices(expert_ids, num_experts)
    return counted


def permute(tokens: Tensor, where: Rows) -> Tensor:
    """Return the token of `tokens` [N, H] of each row: [R, H]."""
    result: Tensor = _Permute.apply(tokens, where)
    return result


def unpermute(rows: Tensor, where: Rows) -> Tensor:
    """Sum the rows [R, H] of each token's present choices: [N, H], the transpose of `permute`."""
    result: Tensor = _Unpermute.apply(rows, where)
    return result


def _gather(tokens: Tensor, where: Rows) -> Tensor:
    planned = where.place, where.ends, len(where.order)
    rows: Tensor = where.ops.spread_rows(tokens.contiguous(), *planned)
    if where.exact or not rows.is_cuda:  # behind the last expert's the twin holds zeros
        return rows
    return rows.masked_fill(~where.present.flatten()[where.order].unsqueeze(1), 0)


def _sum(rows: Tensor, where: Rows) -> Tensor:
    # Each choice's row is read, in the order of choices: no additions race.
    ops = rows_torch if rows.dtype == torch.float64 else where.ops  # the kernel sums in fp32
    summed: Tensor = ops.sum_rows(rows.contiguous(), where.place, where.ends)
    return summed


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, where: Rows) -> Tensor:
        ctx.where = where
        return _gather(tokens, where)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _sum(grads[0], ctx.where), None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, where: Rows) -> Tensor:
        ctx.where = where
        return _sum(rows, where)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _gather(grads[0], ctx.where), None
