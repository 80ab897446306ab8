"""Dispatch by one uneven all-to-all through torch.distributed (NCCL, gloo).

A token leaves once for each of its choices, sorted by destination. For 2 ranks x 2 local experts,
seen by rank 0 (experts 0 and 1), r:i = token from rank r for expert i:

    sent        0:0 0:1 | 0:2 0:3
    received    0:0 0:1 | 1:0 1:1

With `dispatch_dedup` it leaves once for each rank that hosts any of its experts, with the experts'
names and probabilities beside it; that rank adds up what they make of it and sends one row back.

With `dispatch_dtype` fp8 tokens travel in e4m3 with their scales, rounded as the experts' products
would round them on arrival; gradients and the way home stay as they are.

With expert tensor parallelism every rank of the destination's etp group gets the token;
each computes its slice of the FFN, and combine sums the slices because it is the transpose of
dispatch.

Host syncs: one per dispatch, to read how many rows each rank sends and receives; two more while
ranks are compared (`check_splits`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ep_plugin.errors import ConfigError
from ep_plugin.moe.config import CheckSplits, MoEConfig
from ep_plugin.moe.dispatcher._agreement import agreement
from ep_plugin.moe.dispatcher._exchange import (
    Splits,
    WireFormat,
    exchange,
    exchange_tokens,
    wire_format_of,
)
from ep_plugin.moe.dispatcher._once_per_rank import Hosts, once_for_each
from ep_plugin.moe.groups import ExpertGroups
from ep_plugin.moe.interfaces import Dispatched, Packed, Pending, Routing
from ep_plugin.moe.rows import Rows, count_choices, permute, rows_of, unpermute


class _Handle(NamedTuple):
    rows: Rows  # of the rows sent: one for each choice, or each rank
    splits: Splits


class AllToAllDispatcher:
    """Sends each row straight to the ranks that host its expert."""

    def __init__(
        self,
        num_experts: int,
        groups: ExpertGroups,
        dedup: bool = False,
        wire_format: WireFormat | None = None,
        check_splits: CheckSplits = "first",
    ) -> None:
        assert groups.ep_etp is not None
        self.group = groups.ep_etp
        self.ep_size = groups.ep_size
        self.etp_size = groups.etp_size
        self.ep_fastest = groups.ep_fastest
        self.num_experts = num_experts
        self.dedup = dedup
        self.wire_format = wire_format
        self.agreement = agreement(self.group, check_splits)

    def start_dispatch(self, hidden: Tensor, routing: Routing) -> Pending[Dispatched]:
        packed = self.pack(hidden, routing)
        splits = Splits(packed.sent, packed.received)
        tokens = exchange_tokens(packed.outgoing, splits, self.group, self.wire_format)

        def wait() -> Dispatched:
            received, record = tokens()
            return replace(packed.complete(received), tokens8=record)

        return Pending(wait)

    def fail(self) -> None:
        if self.agreement is not None:
            self.agreement.fail()

    def start_combine(self, outbox: Tensor, inbox: Dispatched) -> Pending[Tensor]:
        if self.agreement is not None:
            self.agreement.before_combine()
        handle: _Handle = inbox.handle
        back = Splits(sent=handle.splits.received, received=handle.splits.sent)
        returned = exchange(outbox, back, self.group)  # [P, H]
        return Pending(lambda: self.unpack(returned(), inbox))

    def pack(self, hidden: Tensor, routing: Routing) -> Packed:
        if self.agreement is not None:
            self.agreement.begin_dispatch(hidden, routing.expert_ids, self.num_experts)
        pack = self._once_for_each_rank if self.dedup else self._once_for_each_choice
        return pack(hidden, routing)

    def swap(
        self, outs: Mapping[int, Sequence[Tensor]], ins: Mapping[int, int], after: int
    ) -> Pending[list[Tensor]]:
        counts = list(ins.values())
        came = [like.new_empty(sum(counts), *like.shape[1:]) for like in next(iter(outs.values()))]
        split = [torch.split(tensor, counts) for tensor in came]
        pieces = dict(zip(ins, zip(*split, strict=True), strict=True))
        operations = [
            dist.P2POp(operation, tensor, group=self.group, group_peer=rank)
            for operation, matrices in ((dist.isend, outs), (dist.irecv, pieces))
            for rank, tensors in matrices.items()
            for tensor in tensors
            if tensor.numel()
        ]
        works = dist.batch_isend_irecv(operations) if operations else []

        def wait() -> list[Tensor]:
            for work in works:
                work.wait()
            return came

        return Pending(wait)

    def unpack(self, returned: Tensor, inbox: Dispatched) -> Tensor:
        handle: _Handle = inbox.handle
        return unpermute(returned, handle.rows)

    def _once_for_each_choice(self, hidden: Tensor, routing: Routing) -> Packed:
        counts = self._exchange_counts(routing.tokens_per_expert)  # [2, G, e]
        on_host = counts.sum(2).tolist()  # the host sync
        splits = Splits(*on_host)
        destinations = self._destinations(routing.expert_ids)
        to_each = count_choices(destinations, counts[0].numel())
        rows = rows_of(destinations, to_each, sum(splits.sent))
        copies = routing.probs.repeat_interleave(self.etp_size, dim=1)  # [T, K * etp]
        probs = exchange(copies.flatten()[rows.order], splits, self.group)
        received = counts[1]
        local = torch.arange(received.shape[1], device=hidden.device).repeat(len(received))
        expert_ids = local.repeat_interleave(received.flatten(), output_size=sum(splits.received))

        def complete(tokens: Tensor) -> Dispatched:
            return Dispatched(
                tokens,
                expert_ids.unsqueeze(1),  # [N, 1]
                probs().unsqueeze(1),
                received.sum(0),
                _Handle(rows, splits),
            )

        outgoing, rank = permute(hidden, rows), self.group.rank()
        return Packed(outgoing, rank, *splits, complete, choices=splits.received)

    def _once_for_each_rank(self, hidden: Tensor, routing: Routing) -> Packed:
        hosts = Hosts(self.num_experts // self.ep_size, self.ep_size, self.etp_size)
        hosted = hosts.hosted(routing.expert_ids)  # [T, K, G]
        wanted = hosted.any(1)
        numbers = torch.stack([wanted.sum(0), hosted.sum((0, 1))], dim=1)  # [G, 2]
        rows, chosen = self._both_ways(numbers).movedim(2, 0).tolist()  # the host sync
        splits, num_rows = Splits(*rows), sum(chosen[1])
        copies = once_for_each(wanted, sum(splits.sent))
        names = hosts.local(routing.expert_ids[copies.token], copies.destination)  # [P, K]
        expert_ids = exchange(names, splits, self.group)
        probs = exchange(
            permute(routing.probs, copies.rows).where(names >= 0, 0), splits, self.group
        )

        def complete(tokens: Tensor) -> Dispatched:
            ids = expert_ids()  # [N, K]
            counts = count_choices(ids, hosts.experts)
            return Dispatched(tokens, ids, probs(), counts, _Handle(copies.rows, splits), num_rows)

        outgoing, rank = permute(hidden, copies.rows), self.group.rank()
        return Packed(outgoing, rank, *splits, complete, choices=chosen[1])

    def _exchange_counts(self, tokens_per_expert: Tensor) -> Tensor:
        """Return the rows sent and received [2, G, e], per expert of each rank of the group."""
        sent = tokens_per_expert.view(self.ep_size, -1)
        if self.ep_fastest:
            return self._both_ways(sent.repeat(self.etp_size, 1))
        return self._both_ways(sent.repeat_interleave(self.etp_size, dim=0).contiguous())

    def _both_ways(self, to_ranks: Tensor) -> Tensor:
        """Return the numbers sent and received [2, G, ...] for those sent to each rank [G, ...]."""
        received = torch.empty_like(to_ranks)
        dist.all_to_all_single(received, to_ranks, group=self.group)
        return torch.stack([to_ranks, received])

    def _destinations(self, expert_ids: Tensor) -> Tensor:
        """Return [T, K * etp]: for each copy of a choice its rank of the group, then its expert.

        As one number, rank * e + expert; -1 for dropped choices. Ranks count etp fastest, or ep.
        """
        per_rank = self.num_experts // self.ep_size
        copy = torch.arange(self.etp_size, device=expert_ids.device)
        host = (expert_ids // per_rank).unsqueeze(2)
        rank = host * self.etp_size + copy  # [T, K, etp]
        if self.ep_fastest:
            rank = host + copy * self.ep_size
        numbers = rank * per_rank + (expert_ids % per_rank).unsqueeze(2)
        return numbers.where(expert_ids.unsqueeze(2) >= 0, -1).flatten(1)


def build(config: MoEConfig, groups: ExpertGroups) -> AllToAllDispatcher:
    """Return the dispatcher; raises ConfigError when there is no group to exchange with."""
    if groups.ep_etp is None:
        raise ConfigError(
            f"<dispatcher=alltoall> needs process groups; got <ep={groups.ep_size}>, "
            f"<etp={groups.etp_size}> without one; use <dispatcher=local>"
        )
    return AllToAllDispatcher(
        config.num_experts,
        groups,
        bool(config.dispatch_dedup),
        wire_format_of(config),
        config.check_splits,
    )
