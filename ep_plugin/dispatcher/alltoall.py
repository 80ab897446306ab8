"""Dispatch by one uneven all-to-all through torch.distributed (NCCL, gloo).

Rows leave sorted by destination rank and arrive rank-major; a second permutation makes them
expert-major. For 2 ranks x 2 local experts, seen by rank 0 (experts 0 and 1), r:i = row from rank
r for expert i:

    sent        0:0 0:1 | 0:2 0:3
    received    0:0 0:1 | 1:0 1:1          (rank-major)
    inbox       0:0 1:0   0:1 1:1          (expert-major)

With expert tensor parallelism every rank of the destination's etp group gets the row; each
computes its slice of the FFN, and combine sums the slices because it is the transpose of
dispatch.

Host syncs: one per dispatch, to read how many rows each rank sends and receives.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ep_plugin.config import ConfigError, MoEConfig
from ep_plugin.contracts import Dispatched, Pending, Routing
from ep_plugin.dispatcher._permute import expert_order, permute, unpermute
from ep_plugin.groups import ExpertGroups


class _Splits(NamedTuple):
    sent: list[int]  # rows to each rank of the group
    received: list[int]  # rows from each rank of the group


class _Handle(NamedTuple):
    slots: Tensor  # [N] which of a token's copies each sent row is: (token, choice, etp rank)
    to_experts: Tensor  # [R] rank-major position of each expert-major row
    splits: _Splits
    num_tokens: int
    copies: int


class AllToAllDispatcher:
    """Sends each row straight to the ranks that host its expert."""

    def __init__(self, num_experts: int, groups: ExpertGroups) -> None:
        assert groups.ep_etp is not None
        self.group = groups.ep_etp
        self.ep_size = groups.ep_size
        self.etp_size = groups.etp_size
        self.num_experts = num_experts

    def start_dispatch(self, hidden: Tensor, routing: Routing) -> Pending[Dispatched]:
        num_tokens, topk = routing.expert_ids.shape
        sent, received = self._exchange_counts(routing.tokens_per_expert)  # [ep, e], [G, e], host
        splits = _Splits(
            sent.sum(1).repeat_interleave(self.etp_size).tolist(), received.sum(1).tolist()
        )
        order = expert_order(routing.expert_ids, self.num_experts)[: int(sent.sum())]
        slots = self._copy_for_etp(order, sent.sum(1).tolist())  # [N]
        copies = topk * self.etp_size  # of each token, dropped ones included
        rows, finish_rows = _exchange(permute(hidden, slots, copies), splits, self.group)
        sent_probs = routing.probs.flatten()[slots // self.etp_size]
        probs, finish_probs = _exchange(sent_probs, splits, self.group)
        to_experts = _rank_major_to_expert_major(received).to(hidden.device)  # [R]
        handle = _Handle(slots, to_experts, splits, num_tokens, copies)
        tokens_per_expert = received.sum(0).to(hidden.device)  # [e]

        def wait() -> Dispatched:
            finish_rows()
            finish_probs()
            return Dispatched(rows[to_experts], probs[to_experts], tokens_per_expert, handle)

        return Pending(wait)

    def start_combine(self, rows: Tensor, inbox: Dispatched) -> Pending[Tensor]:
        handle: _Handle = inbox.handle
        rank_major = torch.zeros_like(rows).index_copy(0, handle.to_experts, rows)  # [R, H]
        back = _Splits(sent=handle.splits.received, received=handle.splits.sent)
        returned, finish = _exchange(rank_major, back, self.group)  # [N, H]

        def wait() -> Tensor:
            finish()
            return unpermute(returned, handle.slots, handle.num_tokens, handle.copies)

        return Pending(wait)

    def _exchange_counts(self, tokens_per_expert: Tensor) -> tuple[Tensor, Tensor]:
        """Return on the host the rows sent [ep, e] and received [G, e], per expert."""
        sent = tokens_per_expert.view(self.ep_size, -1)
        to_ranks = sent.repeat_interleave(self.etp_size, dim=0).contiguous()  # [G, e]
        received = torch.empty_like(to_ranks)
        dist.all_to_all_single(received, to_ranks, group=self.group)
        on_host = torch.cat([sent, received]).cpu()  # the host sync
        return on_host[: self.ep_size], on_host[self.ep_size :]

    def _copy_for_etp(self, order: Tensor, sent_per_ep_rank: list[int]) -> Tensor:
        """Repeat each expert-parallel rank's block of `order` for every rank of its etp group."""
        if self.etp_size == 1:
            return order
        blocks = torch.split(order, sent_per_ep_rank)
        copies = [block * self.etp_size + i for block in blocks for i in range(self.etp_size)]
        return torch.cat(copies)


def _rank_major_to_expert_major(received: Tensor) -> Tensor:
    """Return the rank-major position [R] of each expert-major row; `received` [G, e] are counts."""
    ranks, experts = received.shape
    expert_of_row = torch.arange(experts).repeat(ranks).repeat_interleave(received.flatten())
    return expert_of_row.argsort(stable=True)


class _Exchange(torch.autograd.Function):
    """An uneven all-to-all along dim 0; its backward is the exchange with the splits swapped."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, splits: _Splits, group: dist.ProcessGroup, works: list[dist.Work]
    ) -> Tensor:
        ctx.splits, ctx.group = splits, group
        received = rows.new_empty(sum(splits.received), *rows.shape[1:])
        work = dist.all_to_all_single(
            received, rows.contiguous(), splits.received, splits.sent, group=group, async_op=True
        )
        assert work is not None
        works.append(work)
        return received

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        sent = grads[0].new_empty(sum(ctx.splits.sent), *grads[0].shape[1:])
        dist.all_to_all_single(
            sent, grads[0].contiguous(), ctx.splits.sent, ctx.splits.received, group=ctx.group
        )
        return sent, None, None, None


def _exchange(
    rows: Tensor, splits: _Splits, group: dist.ProcessGroup
) -> tuple[Tensor, Callable[[], object]]:
    """Start the exchange of `rows`; read the tensor only after calling the returned function."""
    works: list[dist.Work] = []
    received: Tensor = _Exchange.apply(rows, splits, group, works)
    return received, works[0].wait


def build(config: MoEConfig, groups: ExpertGroups) -> AllToAllDispatcher:
    """Return the dispatcher; raises ConfigError when there is no group to exchange with."""
    if groups.ep_etp is None:
        raise ConfigError(
            f"dispatcher 'alltoall' needs process groups; got ep = {groups.ep_size}, "
            f"etp = {groups.etp_size} without one; dispatcher 'local' would do"
        )
    return AllToAllDispatcher(config.num_experts, groups)
