"""Sorting the choices of this rank's tokens by expert, and summing them back.

For two choices of 3 tokens a b c that chose (E1 E0) (E0 -) (E2 E0), `-` meaning none:

    choice, flat [N*C]     0:aE1 1:aE0 2:bE0 3:b- 4:cE2 5:cE0
    order                  1 2 5 0 4 | 3                        (stable; absent choices go last)
    rows                   a b c a c | b                        E0: a b c   E1: a   E2: c
    place                  3 0 1 - 4 2                          row of each choice

Nothing waits for the device: there is a row for every choice, and those behind the last expert's
belong to absent ones and hold zeros here. Plain torch; on CUDA the kernels of
`kernels/rows.py`.
"""

from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowPlan:
    """Where each choice's row is, expert-major. R = N * C."""

    order: Tensor  # [R] flat choice of each row
    place: Tensor  # [N, C] row of each choice
    present: Tensor  # [N, C] bool
    end: Tensor | None = None  # [1] int32, row behind the last present choice's; on CUDA
    exact: bool = False  # no row is an absent choice's

    def first(self, num_rows: int) -> "RowPlan":
        """Return the plan without the rows behind the first `num_rows`, all of absent choices."""
        return replace(self, order=self.order[:num_rows], exact=True)


def plan_rows(expert_ids: Tensor, num_experts: int) -> RowPlan:
    """Return the plan for `expert_ids` [N, C], local experts or -1 for an absent choice."""
    if expert_ids.is_cuda:
        ends = count_choices(expert_ids, num_experts).cumsum(0, dtype=torch.int32)
        order, place = _kernels().sort_choices(expert_ids, ends)
        return RowPlan(order, place, expert_ids >= 0, ends[-1:])
    flat = expert_ids.flatten()
    order = flat.where(flat >= 0, num_experts).argsort(stable=True)  # [R]
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    return RowPlan(order, place.view_as(expert_ids), expert_ids >= 0)


def count_choices(expert_ids: Tensor, num_experts: int) -> Tensor:
    """Return how many of `expert_ids` [N, C] are each expert's, -1 for none's: [e] int64."""
    if expert_ids.is_cuda:
        counted: Tensor = _kernels().count_choices(expert_ids, num_experts)
        return counted
    bucket = expert_ids.where(expert_ids >= 0, num_experts).flatten()
    counts = bucket.new_zeros(num_experts + 1)
    return counts.scatter_add(0, bucket, torch.ones_like(bucket))[:-1]


def permute(tokens: Tensor, plan: RowPlan) -> Tensor:
    """Return the token of `tokens` [N, H] of each row: [R, H]."""
    result: Tensor = _Permute.apply(tokens, plan)
    return result


def unpermute(rows: Tensor, plan: RowPlan) -> Tensor:
    """Sum the rows [R, H] of each token's present choices: [N, H], the transpose of `permute`."""
    result: Tensor = _Unpermute.apply(rows, plan)
    return result


def _kernels() -> Any:
    return import_module("ep_plugin.moe.kernels.rows")  # Triton, which only CUDA needs


def _gather(tokens: Tensor, plan: RowPlan) -> Tensor:
    if plan.end is not None:
        planned = plan.place, plan.end, len(plan.order)
        rows: Tensor = _kernels().spread_rows(tokens.contiguous(), *planned)
        if plan.exact:
            return rows
    else:
        rows = tokens[plan.order // max(plan.place.shape[1], 1)]
    return rows.masked_fill(~plan.present.flatten()[plan.order].unsqueeze(1), 0)


def _sum(rows: Tensor, plan: RowPlan) -> Tensor:
    # Each choice's row is read, in the order of choices: no additions race.
    if not len(rows):
        return rows.new_zeros(len(plan.place), rows.shape[1])
    if plan.end is not None and rows.dtype != torch.float64:
        summed: Tensor = _kernels().sum_rows(rows.contiguous(), plan.place, plan.end)
        return summed
    chosen = rows[plan.place * plan.present]  # [N, C, H]; an absent choice's: any
    return chosen.masked_fill(~plan.present.unsqueeze(-1), 0).sum(dim=1)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, plan: RowPlan) -> Tensor:
        ctx.plan = plan
        return _gather(tokens, plan)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _sum(grads[0], ctx.plan), None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, plan: RowPlan) -> Tensor:
        ctx.plan = plan
        return _sum(rows, plan)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _gather(grads[0], ctx.plan), None
