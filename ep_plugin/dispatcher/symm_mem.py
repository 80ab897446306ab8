"""Dispatch by stores into the buffers of the other ranks, over NVLink (torch's symmetric memory).

A token is read once and stored where it belongs in the buffer of each rank that hosts any of its
experts, the experts' names and probabilities beside it; nothing is sorted before. For 2 ranks x 2
local experts, rank 0 with tokens a b, rank 1 with c, that chose (E0 E2) (E0 E1) (E3 E2):

    buffer of rank 0    a b         expert ids  0 2 | 0 1
    buffer of rank 1    a c                     0 2 | 3 2       (each rank keeps its own)

On the way back every rank reads its tokens' rows where the experts' ranks left them, and sums them
in fp32, by rank. Each is the other's backward.

    dispatch    barrier, store to all ranks, barrier, copy out of the own buffer
    combine     barrier, copy into the own buffer, barrier, read from all ranks

The copies let the next layer have the buffer: N rows are read and written once more in local
memory, at about four times the speed of the link. The kernels run on `comm_sms` SMs, on a stream of
their own. `dispatch_dedup` changes nothing here. All ranks of ep and etp must be on one host.

Schedule `chunked` does without the kernels: `swap` has the copy engines move rows, which takes no
SM from the experts and fills the link better. They move blocks, so every rank gets all tokens of
all ranks, the experts' names beside them, and what is no one's choice is not computed.

    buffer      tokens (or gradients) on their way out, by sender | the same on their way home

Host syncs: one per dispatch, to read how many rows each rank receives. While a CUDA graph is
captured there is none: all tokens of all ranks are allowed for then, and rows that did not come
are no one's choice. No rank may then have more tokens than a rank had in a call before, and a
group at most 8 ranks; buffers of such a group always have room for all.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from ep_plugin.config import ConfigError, MoEConfig
from ep_plugin.contracts import Dispatched, Packed, Pending, Routing
from ep_plugin.dispatcher._once import Hosts
from ep_plugin.dispatcher._shared_buffer import SharedBuffer, shared_buffer
from ep_plugin.groups import ExpertGroups
from ep_plugin.kernels.peers_torch import Peers, rows_of
from ep_plugin.permute import count_choices

_ALIGN = 128  # bytes; each tensor in the buffers starts at a multiple of it
_GRAPH_RANKS = 8  # with more, buffers for all tokens of all ranks would be too large


class _Plan(NamedTuple):
    place: Tensor  # [T, G] int32, row of each token among those of each rank, -1 = not sent
    received: int  # rows on this rank, N; while a graph is captured `most`
    most: int  # rows that the buffers have room for, the same on every rank
    choices: int | None  # of this rank's experts, where the host knows
    came: Tensor  # [] int64, rows on this rank


def _captured(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


class _Link(NamedTuple):
    """How rows get from rank to rank."""

    buffer: SharedBuffer
    programs: int  # SMs the kernels run on

    def push(self, tensors: Sequence[Tensor], plan: _Plan) -> tuple[Tensor, ...]:
        """Send rows of each tensor [T, W]; return those received, [N, W] each, by source rank."""
        ops, offsets, peers = self._begin(tensors, plan)
        for rows, offset in zip(tensors, offsets, strict=True):
            ops.push_rows(rows.contiguous(), peers, offset, plan.place, self.programs)
        self.buffer.barrier()
        own = peers.buffers[self.buffer.rank]
        return tuple(
            rows_of(own, offset, plan.received, rows).clone()
            for rows, offset in zip(tensors, offsets, strict=True)
        )

    def sum_home(self, tensors: Sequence[Tensor], plan: _Plan) -> tuple[Tensor, ...]:
        """Return the sums [T, W] over ranks of each token's rows of each tensor [N, W]."""
        ops, offsets, peers = self._begin(tensors, plan)
        own = peers.buffers[self.buffer.rank]
        for rows, offset in zip(tensors, offsets, strict=True):
            rows_of(own, offset, plan.received, rows).copy_(rows)
        self.buffer.barrier()
        return tuple(
            ops.sum_rows(rows, peers, offset, plan.place, self.programs)
            for rows, offset in zip(tensors, offsets, strict=True)
        )

    def _begin(self, tensors: Sequence[Tensor], plan: _Plan) -> tuple[Any, list[int], Peers]:
        """Return kernels, each tensor's offset and the buffers, which no rank uses any more."""
        offsets, end = [], 0
        for rows in tensors:
            offsets.append(end)
            size = plan.most * rows.shape[1] * rows.element_size()
            end += -(-size // _ALIGN) * _ALIGN
        peers = self.buffer.reserve(end, plan.place.device)
        self.buffer.barrier()
        kernels = "peers" if plan.place.is_cuda else "peers_torch"
        return import_module(f"ep_plugin.kernels.{kernels}"), offsets, peers


class SymmetricMemoryDispatcher:
    """Stores each token in the buffers of the ranks that host its experts; sums what they leave."""

    def __init__(self, num_experts: int, groups: ExpertGroups, comm_sms: int) -> None:
        assert groups.ep_etp is not None
        self.group = groups.ep_etp
        self.ep_size, self.ep_rank, self.etp_size = groups.ep_size, groups.ep_rank, groups.etp_size
        self.experts = num_experts // groups.ep_size  # of a rank
        self.link = _Link(shared_buffer(groups), comm_sms)
        self.most_tokens = 0  # that a rank had in a call

    swaps = True
    narrow = None

    def start_dispatch(self, hidden: Tensor, routing: Routing) -> Pending[Dispatched]:
        plan = self._plan(routing.expert_ids)
        inputs = (hidden, routing.probs, routing.expert_ids)
        (tokens, probs, chosen), finish = self.link.buffer.beside(
            (*inputs, plan.place), lambda: _Dispatch.apply(self.link, plan, *inputs)
        )

        def wait() -> Dispatched:
            finish()
            here = self._is_here(chosen)
            if plan.choices is None:  # there may be rows that nobody wrote
                rows = torch.arange(len(here), device=here.device)
                here &= (rows < plan.came).unsqueeze(1)
            return self._dispatched(tokens, chosen, probs, here, plan)

        return Pending(wait)

    def _is_here(self, chosen: Tensor) -> Tensor:
        first = self.ep_rank * self.experts
        return (chosen >= first) & (chosen < first + self.experts)

    def _dispatched(
        self, tokens: Tensor, chosen: Tensor, probs: Tensor, here: Tensor, plan: _Plan
    ) -> Dispatched:
        """Return what came; of the choices those `here` are of this rank's experts."""
        ids = (chosen - self.ep_rank * self.experts).where(here, -1)
        own = tokens, ids, probs.where(here, 0), count_choices(ids, self.experts)
        return Dispatched(*own, handle=plan, num_rows=plan.choices)

    def start_combine(self, outbox: Tensor, inbox: Dispatched) -> Pending[Tensor]:
        (summed,), finish = self.link.buffer.beside(
            (outbox,), lambda: (_Combine.apply(outbox, self.link, inbox.handle),)
        )

        def wait() -> Tensor:
            finish()
            return summed

        return Pending(wait)

    def pack(self, hidden: Tensor, routing: Routing) -> Packed:
        """Send names and probabilities of all tokens to all ranks; the tokens are yet to go."""
        num_tokens, device = len(hidden), hidden.device
        most = self._most_tokens(hidden)
        ranks, rank = self.ep_size * self.etp_size, self.link.buffer.rank
        if num_tokens < most:  # every rank has as many rows, some of nobody
            hidden, probs, ids = (
                pad(rows, (0, 0, 0, most - num_tokens), value=value)
                for rows, value in ((hidden, 0), (routing.probs, 0), (routing.expert_ids, -1))
            )
        else:
            probs, ids = routing.probs, routing.expert_ids
        own = torch.arange(rank * most, (rank + 1) * most, dtype=torch.int32, device=device)
        rows = ranks * most
        plan = _Plan(own.unsqueeze(1).expand(-1, ranks).contiguous(), rows, rows, None, own)
        size = hidden.shape[1] * hidden.element_size()
        self.link.buffer.reserve(2 * (ranks - 1) * most * size, device)
        (all_probs, chosen), finish = self.link.buffer.beside(
            (probs, ids, plan.place), lambda: _Dispatch.apply(self.link, plan, probs, ids)
        )

        def complete(tokens: Tensor) -> Dispatched:
            finish()
            here = self._is_here(chosen)
            found = self._dispatched(tokens, chosen, all_probs, here, plan)
            return replace(found, handle=num_tokens)

        return Packed(hidden, rank, [most] * ranks, [most] * ranks, complete, to_all=True)

    def swap(
        self, outs: Mapping[int, Tensor], ins: Mapping[int, int], after: int
    ) -> Pending[Tensor]:
        like = next(iter(outs.values()))
        buffer = self.link.buffer
        peers = buffer.reserve(0, like.device)
        size = like.shape[1] * like.element_size()

        def move() -> tuple[Tensor, ...]:
            if not after:  # and later ones write where no rank reads any more
                buffer.barrier()
            for slot, (rank, rows) in enumerate(outs.items()):
                offset = (after + slot * len(rows)) * size
                rows_of(peers.buffers[rank], offset, len(rows), rows).copy_(rows)
            buffer.barrier()
            return (rows_of(peers.buffers[buffer.rank], after * size, sum(ins.values()), like),)

        (came,), finish = buffer.beside(list(outs.values()), move)

        def wait() -> Tensor:
            finish()
            return came

        return Pending(wait)

    def unpack(self, returned: Tensor, inbox: Dispatched) -> Tensor:
        num_tokens: int = inbox.handle
        return returned if num_tokens == len(returned) else returned[:num_tokens]

    def _most_tokens(self, hidden: Tensor) -> int:
        """Return the most tokens of any rank; while a graph is captured, of any call before."""
        if _captured(hidden):
            self._check_capture(len(hidden))
            return self.most_tokens
        own = torch.tensor([len(hidden)], device=hidden.device)
        of_ranks = own.new_empty(self.ep_size * self.etp_size)
        dist.all_gather_into_tensor(of_ranks, own, group=self.group)
        most = int(of_ranks.max())  # the host sync
        self.most_tokens = max(self.most_tokens, most)
        return most

    def _plan(self, expert_ids: Tensor) -> _Plan:
        """Tell all ranks how many rows go where; return where this rank's do."""
        captured = _captured(expert_ids)
        if captured:
            self._check_capture(len(expert_ids))
        hosts = Hosts(self.experts, self.ep_size, self.etp_size)
        hosted = hosts.hosted(expert_ids)  # [T, K, G]
        sent = hosted.any(1)
        rows = sent.sum(0)
        own = torch.stack([rows, hosted.sum((0, 1)), torch.full_like(rows, len(sent))])  # [3, G]
        table = own.new_empty(3 * len(rows), len(rows))
        dist.all_gather_into_tensor(table, own, group=self.group)
        table = table.view(-1, *own.shape)  # [from, 3, to]
        rank, counts = self.link.buffer.rank, table[:, 0]
        # Along rows that lie in memory: torch sums down columns one after another on a GPU.
        earlier = sent.T.contiguous().cumsum(1).T - 1
        place = counts[:rank].sum(0) + earlier
        place = place.where(sent, -1).to(torch.int32)  # [T, G]
        came = counts[:, rank].sum()
        if captured:
            most = self.most_tokens * len(counts)
            return _Plan(place, most, most, None, came)
        busiest = counts.sum(0).max()
        numbers = torch.stack([came, table[:, 1, rank].sum(), table[:, 2].max(), busiest])
        received, choices, tokens_of_a_rank, most = numbers.tolist()  # the host sync
        self.most_tokens = max(self.most_tokens, tokens_of_a_rank)
        # Routing changes, and growing stops all ranks: a quarter more than this call needs.
        room = self.most_tokens * len(counts) if len(counts) <= _GRAPH_RANKS else most + most // 4
        return _Plan(place, received, room, choices, came)

    def _check_capture(self, num_tokens: int) -> None:
        ranks = self.ep_size * self.etp_size
        if ranks > _GRAPH_RANKS:
            raise ConfigError(
                f"a graph of dispatcher 'symm_mem' must have at most {_GRAPH_RANKS} ranks of ep "
                f"and etp; got {ranks}; steps that are not captured would do"
            )
        if num_tokens > self.most_tokens:
            raise ConfigError(
                f"a graph of dispatcher 'symm_mem' must have at most the tokens ({num_tokens}) of "
                f"a call before it ({self.most_tokens} on any rank); a step that is not captured, "
                "with as many tokens, would do"
            )


class _Dispatch(torch.autograd.Function):
    """Rows of matrices to where the plan says; the last are whole numbers."""

    @staticmethod
    def forward(ctx: Any, link: _Link, plan: _Plan, *rows: Tensor) -> tuple[Tensor, ...]:
        ctx.link, ctx.plan = link, plan
        received = link.push(rows, plan)
        ctx.mark_non_differentiable(received[-1])
        return received

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.link.sum_home(grads[:-1], ctx.plan), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, outbox: Tensor, link: _Link, plan: _Plan) -> Tensor:
        ctx.link, ctx.plan = link, plan
        return link.sum_home((outbox,), plan)[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.link.push(grads, ctx.plan)[0], None, None


def build(config: MoEConfig, groups: ExpertGroups) -> SymmetricMemoryDispatcher:
    """Return the dispatcher; every rank must call it.

    Raises ConfigError when there is no group to exchange with, or it spans several hosts.
    """
    if groups.ep_etp is None:
        raise ConfigError(
            f"dispatcher 'symm_mem' needs process groups; got ep = {groups.ep_size}, "
            f"etp = {groups.etp_size} without one; dispatcher 'local' would do"
        )
    if config.dispatch_dtype != "bf16":
        raise ConfigError(
            "dispatcher 'symm_mem' carries tokens as they are; got dispatch_dtype = "
            f"{config.dispatch_dtype}; dispatcher 'alltoall' or dispatch_dtype = bf16 would do"
        )
    return SymmetricMemoryDispatcher(config.num_experts, groups, config.comm_sms)
