"""Dispatch in two legs: between nodes, each token once to a node, and then inside the node.

A token crosses to the rank of the same place in each node that hosts any of its experts, and that
rank, the relay, passes it on to the ranks of its node that do. For 2 nodes x 2 ranks with one
expert each, E0 and E1 on node A, E2 and E3 on node B; a b of rank 0 chose (E2 E3) (E1 E3), c of
rank 1 (E0 E2), d of rank 2 (E0 E1):

    node                     A                  |           B
    rank              0             1           |    2             3
    hidden            a b           c           |    d             -
    between nodes     b d           c           |    a b           c         rails 0 2 and 1 3
    inside nodes      d | c         b d |       |    a | c         a b |     from the first | second

Relays keep what their own rank chose for their node. On the way back each sums what its node's
ranks made of a token, and one row crosses. So `commands/plan/network.py` counts it: with D nodes of
L ranks a rank sends D - 1 messages to other nodes and L - 1 inside its own, where the other
dispatchers send D * L - 1. It pays where the network between nodes is slower than inside; on one
node it is `alltoall` with `dispatch_dedup`, and one copy more. `dispatch_dedup` changes nothing
here.

A group may span nodes unevenly: the ranks of the smallest part are then relays for several ranks
of the others (`groups.rails`). A rank receives its rows by relay, then by the rank they come from.

With `dispatch_dtype` fp8 tokens are rounded once, by the rank they come from, and cross both legs
in e4m3; with expert tensor parallelism every rank of the destination's etp group gets the token.

Host syncs: one per dispatch, for the numbers of both legs together; two more while ranks are
compared (`check_splits`).
"""

from collections.abc import Callable
from itertools import accumulate, islice
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

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
from ep_plugin.moe.groups import ExpertGroups, by_node, relays
from ep_plugin.moe.interfaces import Dispatched, Pending, Routing
from ep_plugin.moe.rows import Rows, count_choices, permute, unpermute


class _Leg(NamedTuple):
    """One exchange, as combine needs it for the way back."""

    rows: Rows  # those sent
    splits: Splits
    group: dist.ProcessGroup


_Handle = tuple[_Leg, _Leg]  # between nodes, and inside this one


class HierarchicalDispatcher:
    """Sends each token once to a node, and there once to a rank; sums rows where it split them."""

    def __init__(
        self,
        num_experts: int,
        groups: ExpertGroups,
        wire_format: WireFormat | None = None,
        check_splits: CheckSplits = "first",
    ) -> None:
        assert groups.ep_etp is not None
        assert groups.intra_node is not None
        assert groups.inter_node is not None
        assert groups.ranks_per_node is not None
        self.intra, self.inter = groups.intra_node, groups.inter_node
        self.ranks_per_node = groups.ranks_per_node
        self.num_experts = num_experts
        self.hosts = Hosts(num_experts // groups.ep_size, groups.ep_size, groups.etp_size)
        rank, ranks = dist.get_rank(), dist.get_process_group_ranks(groups.ep_etp)
        nodes = by_node(ranks, self.ranks_per_node)
        self.sizes = [len(node) for node in nodes]
        self.relays = relays(nodes, rank)  # of each node, on this rank's rail
        here = next(i for i, node in enumerate(nodes) if rank in node)
        first = [0, *accumulate(self.sizes)][here]
        self.own = slice(first, first + self.sizes[here])  # this node's ranks in the expert group
        self.wire_format = wire_format
        self.agreement = agreement(groups.ep_etp, check_splits)

    def start_dispatch(self, hidden: Tensor, routing: Routing) -> Pending[Dispatched]:
        ids = routing.expert_ids
        if self.agreement is not None:
            self.agreement.begin_dispatch(
                hidden, ids, self.num_experts, **{"ranks of a node": self.ranks_per_node}
            )
        wanted = self.hosts.wanted(ids)  # [T, G]
        between, inside = self._count(wanted)
        copies = once_for_each(self._by_node(wanted), sum(between.sent))
        leg = _Leg(copies.rows, between, self.inter)
        expert_ids = exchange(ids[copies.token], between, self.inter)
        probs = exchange(permute(routing.probs, copies.rows), between, self.inter)
        rows = permute(hidden, copies.rows)  # [P, H]
        tokens = exchange_tokens(rows, between, self.inter, self.wire_format)
        return Pending(lambda: self._pass_on(expert_ids(), probs, tokens, leg, inside))

    def fail(self) -> None:
        if self.agreement is not None:
            self.agreement.fail()

    def start_combine(self, outbox: Tensor, inbox: Dispatched) -> Pending[Tensor]:
        if self.agreement is not None:
            self.agreement.before_combine()
        handle: _Handle = inbox.handle
        between, inside = handle
        at_relay = _start_home(outbox, inside)
        return Pending(lambda: _start_home(at_relay(), between)())

    def _pass_on(
        self,
        expert_ids: Tensor,
        probs: Callable[[], Tensor],
        tokens: Callable[[], tuple[Tensor, Any]],
        between: _Leg,
        splits: Splits,
    ) -> Dispatched:
        """Send what comes over the rail, [M, K] and [M, H], to the ranks of this node."""
        wanted = self.hosts.wanted(expert_ids)[:, self.own]
        where, token, destination = once_for_each(wanted, sum(splits.sent))
        chosen = self.hosts.local(expert_ids[token], destination + self.own.start)  # [P, K]
        at_relay, record = tokens()  # before the exchanges below, so that no two legs compete
        wire_format = None if record is None else lambda _: _rows_of(record, token)
        local_ids = exchange(chosen, splits, self.intra)
        local_probs = exchange(permute(probs(), where).where(chosen >= 0, 0), splits, self.intra)
        received = exchange_tokens(permute(at_relay, where), splits, self.intra, wire_format)
        ids = local_ids()  # [N, K]
        counts = count_choices(ids, self.hosts.experts)
        handle: _Handle = between, _Leg(where, splits, self.intra)
        arrived, arrived_record = received()
        return Dispatched(*(arrived, ids, local_probs(), counts, handle), tokens8=arrived_record)

    def _by_node(self, wanted: Tensor) -> Tensor:
        """Return [T, D] bool: whether a node has any of the ranks that are `wanted` [T, G]."""
        nodes = wanted.split_with_sizes(self.sizes, dim=1)
        return torch.stack([ranks.any(1) for ranks in nodes], dim=1)

    def _count(self, wanted: Tensor) -> tuple[Splits, Splits]:
        """Return the rows this rank moves between nodes, and inside its own, both ways."""
        rail, node = dist.get_world_size(self.inter), dist.get_world_size(self.intra)
        to_nodes = self._by_node(wanted).sum(0)  # [D]
        in_nodes = wanted.sum(0).split_with_sizes(self.sizes)
        to_ranks = pad_sequence(list(in_nodes), batch_first=True)  # [D, L]
        numbers = torch.cat([to_nodes.unsqueeze(1), to_ranks], dim=1)
        of_relay = dict(zip(self.relays, numbers, strict=True))
        nothing = torch.zeros_like(numbers[0])
        told = torch.stack([of_relay.get(place, nothing) for place in range(rail)])
        heard = torch.empty_like(told)  # from each rank of the rail: rows, and how they go on
        dist.all_to_all_single(heard, told, group=self.inter)
        passed_on = heard[:, 1 : 1 + node].sum(0)  # [L] to each rank of this node
        arriving = torch.empty_like(passed_on)
        dist.all_to_all_single(arriving, passed_on, group=self.intra)
        lists = (told[:, 0], heard[:, 0], passed_on, arriving)
        on_host = iter(torch.cat(lists).tolist())  # the host sync
        leaving, coming, out, into = ([*islice(on_host, len(part))] for part in lists)
        return Splits(leaving, coming), Splits(out, into)


def _start_home(rows: Tensor, leg: _Leg) -> Callable[[], Tensor]:
    """Start sending `rows` back along `leg`; the function returned sums them where they split."""
    sent, received = leg.splits
    returned = exchange(rows, Splits(sent=received, received=sent), leg.group)
    return lambda: unpermute(returned(), leg.rows)


def _rows_of(record: Any, rows: Tensor) -> Any:
    """Return some rows of a Rows8 or Blocks8, as they are."""
    data = record.data.view(torch.uint8)[rows]  # not all backends index e4m3
    return type(record)(data.view(record.data.dtype), record.scale[rows])


def build(config: MoEConfig, groups: ExpertGroups) -> HierarchicalDispatcher:
    """Return the dispatcher; raises ConfigError when it is not known which ranks share a node."""
    if groups.ep_etp is None:
        raise ConfigError(
            f"<dispatcher=hierarchical> needs process groups; got <ep={groups.ep_size}>, "
            f"<etp={groups.etp_size}> without one; use <dispatcher=local>"
        )
    if groups.ranks_per_node is None:
        raise ConfigError(
            "<dispatcher=hierarchical> needs to know which ranks share a node; got ranks_per_node "
            "= None and no LOCAL_WORLD_SIZE of torchrun; use create_expert_groups(..., "
            "ranks_per_node=8) or <dispatcher=alltoall>"
        )
    return HierarchicalDispatcher(
        config.num_experts, groups, wire_format_of(config), config.check_splits
    )
