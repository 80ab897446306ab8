"""A dispatcher of your own: every rank gets all tokens, computes its experts' part, and adds up.

All ranks must have as many tokens. It sends more than it needs to: simple, and right.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ep_plugin import ExpertGroups, MoEConfig
from ep_plugin.contracts import Dispatched, Pending, Routing


def gather(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the rows of all ranks [G * T, ...], rank 0's first."""
    everyone = [torch.empty_like(rows) for _ in range(group.size())]
    dist.all_gather(everyone, rows.contiguous(), group=group)
    return torch.cat(everyone)


def add_up(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the sum over ranks of this rank's part [T, ...] of `rows` [G * T, ...]."""
    rows = rows.clone()
    dist.all_reduce(rows, group=group)
    return rows.chunk(group.size())[group.rank()]


class Gather(torch.autograd.Function):
    """`gather`; the backward of each of the two is the other."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return gather(rows, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return add_up(grads[0], ctx.group), None


class AddUp(torch.autograd.Function):
    """`add_up`."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return add_up(rows, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return gather(grads[0], ctx.group), None


class MyDispatcher:
    """Dispatch gathers, combine adds up; both are done before they return."""

    def __init__(self, num_experts: int, groups: ExpertGroups) -> None:
        assert groups.ep is not None
        self.group, self.num_local = groups.ep, num_experts // groups.ep_size
        self.first = groups.ep_rank * self.num_local  # expert of this rank

    def start_dispatch(self, hidden: Tensor, routing: Routing) -> Pending[Dispatched]:
        """Return all tokens [N, H], and which of this rank's experts each is for."""
        tokens = Gather.apply(hidden, self.group)
        probs = Gather.apply(routing.probs, self.group)  # [N, K]
        ids = gather(routing.expert_ids, self.group) - self.first  # [N, K]
        here = (ids >= 0) & (ids < self.num_local)
        counts = ids[here].bincount(minlength=self.num_local)  # [e]
        inbox = Dispatched(tokens, ids.where(here, -1), probs, counts, handle=None)
        return Pending(lambda: inbox)

    def start_combine(self, outbox: Tensor, inbox: Dispatched) -> Pending[Tensor]:
        """Return the sums [T, H] of what all ranks' experts made of this rank's tokens."""
        summed: Tensor = AddUp.apply(outbox, self.group)
        return Pending(lambda: summed)


def build(config: MoEConfig, groups: ExpertGroups) -> MyDispatcher:
    """Return the dispatcher."""
    return MyDispatcher(config.num_experts, groups)
