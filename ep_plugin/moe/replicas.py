"""Tokens that several ranks hold alike travel once: each of the ranks dispatches its share.

Tensor parallelism without sequence parallelism leaves all ranks of a tp group with the same tokens.
As in DeepSpeed-MoE (arXiv:2201.05596, section 5.3, parallelism-coordinated communication) the
replicas are dropped before the exchange, and results are gathered after it. For 2 ranks:

    rank 0    a b c    drop: a b    dispatch, experts, combine    a' b'    gather: a' b' c'
    rank 1    a b c    drop: c      dispatch, experts, combine    c'       gather: a' b' c'

Dropping and gathering are each other's backward, so every rank has the whole gradient of its tokens
and probabilities, alike on all of them, and an expert sees each token once. The router is outside:
it routes all tokens on every rank, and must do it alike.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ep_plugin.moe.groups import all_gather_single
from ep_plugin.moe.interfaces import Dispatched, Dispatcher, Pending, Routing, tell_failure
from ep_plugin.moe.rows import count_choices


class _Share(NamedTuple):
    """The rows of this rank among those all ranks of `group` hold."""

    num_rows: int
    group: dist.ProcessGroup

    @property
    def size(self) -> int:
        return -(-self.num_rows // self.group.size())  # of the last ranks less

    def drop(self, rows: Tensor) -> Tensor:
        first = self.group.rank() * self.size
        return rows[first : first + self.size]

    def gather(self, rows: Tensor) -> Tensor:
        """Return the rows of all ranks [T, ...] for this one's."""
        if not self.num_rows:
            return rows
        padded = rows.new_zeros(self.size, *rows.shape[1:])
        padded[: len(rows)] = rows
        everything = rows.new_empty(self.group.size() * self.size, *rows.shape[1:])
        all_gather_single(everything, padded, group=self.group)
        return everything[: self.num_rows]


class _Handle(NamedTuple):
    share: _Share
    inner: Any  # the dispatcher's own


class OncePerReplica:
    """A dispatcher for ranks of `group` that hold the same tokens, in the same order."""

    def __init__(self, dispatcher: Dispatcher, group: dist.ProcessGroup) -> None:
        self.dispatcher, self.group = dispatcher, group

    def start_dispatch(self, hidden: Tensor, routing: Routing) -> Pending[Dispatched]:
        share = _Share(len(hidden), self.group)
        ids = share.drop(routing.expert_ids)
        counts = count_choices(ids, len(routing.tokens_per_expert))
        mine = Routing(ids, _Drop.apply(routing.probs, share), counts)
        pending = self.dispatcher.start_dispatch(_Drop.apply(hidden, share), mine)

        def wait() -> Dispatched:
            inbox = pending.wait()
            return replace(inbox, handle=_Handle(share, inbox.handle))

        return Pending(wait)

    def start_combine(self, outbox: Tensor, inbox: Dispatched) -> Pending[Tensor]:
        handle: _Handle = inbox.handle
        share, inner = handle
        pending = self.dispatcher.start_combine(outbox, replace(inbox, handle=inner))
        return Pending(lambda: _Gather.apply(pending.wait(), share))

    def fail(self) -> None:
        tell_failure(self.dispatcher)


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, share: _Share) -> Tensor:
        ctx.share = share
        return share.drop(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.share.gather(grads[0]), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, share: _Share) -> Tensor:
        ctx.share = share
        return share.gather(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.share.drop(grads[0]), None
