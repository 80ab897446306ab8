"""Dispatch by stores into the buffers of the other ranks, over NVLink (torch's symmetric memory).

A token is read once and stored where it belongs in the buffer of each rank that hosts any of its
experts, the experts' names and probabilities beside it; nothing is sorted before. For 2 ranks x 2
local experts, rank 0 with tokens a b, rank 1 with c, that chose (E0 E2) (E0 E1) (E3 E2):

    buffer of rank 0    a b         expert ids  0 2 | 0 1
    buffer of rank 1    a c                     0 2 | 3 2       (each rank keeps its own)

On the way back every rank reads its tokens' rows where the experts' ranks left them, and sums them
in fp32, by rank. Each is the other's backward.

The kernels run on `comm_sms` SMs, on a stream of their own; `_link.py` has the steps.
`dispatch_dedup` changes nothing here. All ranks of ep and etp must be on one host.

Under schedule `chunked` these kernels are not used. There `swap` has the GPU's copy engines move
rows, which takes no SM from the experts and fills the link better. They move blocks, so
every rank gets all tokens of all ranks, the experts' names beside them, and what is no one's choice
is not computed.

    buffer      tokens (or gradients) on their way out, by sender | the same on their way home

Host syncs: one per dispatch, to read how many rows each rank receives. While a CUDA graph is
captured there is none: all tokens of all ranks are allowed for then, and rows that did not come
are no one's choice. No rank may then have more tokens than a rank had in a call before, and a
group at most 8 ranks; buffers of such a group always have room for all.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ep_plugin.errors import ConfigError
from ep_plugin.moe.config import GRAPH_RANKS, MoEConfig
from ep_plugin.moe.dispatcher import _trial
from ep_plugin.moe.dispatcher._link import Combine, Dispatch, Link, Sends
from ep_plugin.moe.dispatcher._once_per_rank import Hosts
from ep_plugin.moe.dispatcher._shared_buffer import shared_buffer
from ep_plugin.moe.groups import ExpertGroups, all_gather_single
from ep_plugin.moe.interfaces import Dispatched, Packed, Pending, Routing
from ep_plugin.moe.kernels import select


def _captured(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


class SymmetricMemoryDispatcher:
    """Stores each token in the buffers of the ranks that host its experts; sums what they leave."""

    wire_format = None

    def __init__(self, num_experts: int, groups: ExpertGroups, comm_sms: int) -> None:
        assert groups.ep_etp is not None
        self.group = groups.ep_etp
        self.experts = num_experts // groups.ep_size  # of a rank
        self.first = groups.ep_rank * self.experts  # of this one
        self.hosts = Hosts(self.experts, groups.ep_size, groups.etp_size)
        self.link = Link(shared_buffer(groups), comm_sms)
        self.most_tokens = 0  # that a rank had in a call

    def start_dispatch(self, hidden: Tensor, routing: Routing) -> Pending[Dispatched]:
        sends = self._plan(routing.expert_ids)
        inputs = (hidden, routing.probs, routing.expert_ids)
        (tokens, probs, chosen), finish = self.link.buffer.beside(
            (*inputs, sends.place), lambda: Dispatch.apply(self.link, sends, *inputs)
        )

        def wait() -> Dispatched:
            finish()
            own = self._own(chosen, probs, sends.came)
            return Dispatched(tokens, *own, handle=sends, num_rows=sends.choices)

        return Pending(wait)

    def _own(
        self, chosen: Tensor, probs: Tensor, came: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return local experts, probabilities and tokens of each expert, of the choices here.

        With `came` there may be rows behind that nobody wrote.
        """
        own: tuple[Tensor, Tensor, Tensor] = _Own.apply(
            probs, chosen, came, self.first, self.experts
        )
        return own

    def start_combine(self, outbox: Tensor, inbox: Dispatched) -> Pending[Tensor]:
        sends: Sends = inbox.handle
        (summed,), finish = self.link.buffer.beside(
            (outbox,), lambda: (Combine.apply(outbox, self.link, sends),)
        )

        def wait() -> Tensor:
            finish()
            return summed

        return Pending(wait)

    def pack(self, hidden: Tensor, routing: Routing) -> Packed:
        """Send names and probabilities of all tokens to all ranks; the tokens are yet to go."""
        num_tokens, device = len(hidden), hidden.device
        most, choices = self._most_tokens(routing.expert_ids)
        probs, ids = routing.probs, routing.expert_ids
        if num_tokens < most:  # every rank has as many rows, some of nobody
            below = (0, 0, 0, most - num_tokens)
            hidden, probs, ids = pad(hidden, below), pad(probs, below), pad(ids, below, value=-1)
        ranks, rank = self.link.buffer.ranks, self.link.buffer.rank
        own = torch.arange(rank * most, (rank + 1) * most, dtype=torch.int32, device=device)
        rows = ranks * most
        sends = Sends(own.unsqueeze(1).expand(-1, ranks).contiguous(), rows, rows, None)
        self.link.prepare_swaps((hidden, probs))
        (all_probs, chosen), finish = self.link.buffer.beside(
            (probs, ids, sends.place), lambda: self.link.push((probs.detach(), ids), sends)
        )

        def complete(tokens: Tensor) -> Dispatched:
            finish()
            own = self._own(chosen, all_probs, None)
            return Dispatched(tokens, *own, handle=num_tokens)

        counts = [most] * ranks
        return Packed(hidden, rank, counts, counts, complete, choices, probs)

    def swap(
        self, outs: Mapping[int, Sequence[Tensor]], ins: Mapping[int, int], after: int
    ) -> Pending[list[Tensor]]:
        return self.link.swap(outs, ins, after)

    def unpack(self, returned: Tensor, inbox: Dispatched) -> Tensor:
        num_tokens: int = inbox.handle
        return returned if num_tokens == len(returned) else returned[:num_tokens]

    def _most_tokens(self, expert_ids: Tensor) -> tuple[int, list[int] | None]:
        """Return the most tokens of a rank, and the choices of this one's experts of each rank.

        While a graph is captured: the most of any call before, and None.
        """
        if _captured(expert_ids):
            self._check_capture(len(expert_ids))
            return self.most_tokens, None
        own, _ = select(expert_ids).count_sends(expert_ids, *self.hosts)
        of_ranks = self._of_ranks(own).tolist()  # the host sync
        most = max(tokens[0] for _, _, tokens in of_ranks)
        self.most_tokens = max(self.most_tokens, most)
        return most, [choices[self.link.buffer.rank] for _, choices, _ in of_ranks]

    def _plan(self, expert_ids: Tensor) -> Sends:
        """Tell all ranks how many rows go where; return where this rank's do."""
        captured = _captured(expert_ids)
        if captured:
            self._check_capture(len(expert_ids))
        ops, rank, ranks = select(expert_ids), self.link.buffer.rank, self.link.buffer.ranks
        own, before = ops.count_sends(expert_ids, *self.hosts)
        table = self._of_ranks(own)  # [from, 3, to]
        place, numbers = ops.place_sends(expert_ids, before, table, rank, *self.hosts)
        if captured:
            most = self.most_tokens * ranks
            return Sends(place, most, most, None, came=numbers[0])
        received, choices, tokens_of_a_rank, most = numbers.tolist()  # the host sync
        self.most_tokens = max(self.most_tokens, tokens_of_a_rank)
        # Routing changes, and growing stops all ranks: a quarter more than this call needs.
        room = self.most_tokens * ranks if ranks <= GRAPH_RANKS else most + most // 4
        return Sends(place, received, room, choices)

    def _of_ranks(self, own: Tensor) -> Tensor:
        """Return every rank's `own` [a, ...]: [G, a, ...]."""
        ranks = self.link.buffer.ranks
        gathered = own.new_empty(ranks * len(own), *own.shape[1:])
        all_gather_single(gathered, own, group=self.group)
        return gathered.view(ranks, *own.shape)

    def _check_capture(self, num_tokens: int) -> None:
        ranks = self.link.buffer.ranks
        if ranks > GRAPH_RANKS:
            raise ConfigError(
                f"a CUDA graph of <dispatcher=symm_mem> takes at most {GRAPH_RANKS} ranks of ep "
                f"and etp; got {ranks}; run the step without a CUDA graph"
            )
        if num_tokens > self.most_tokens:
            raise ConfigError(
                "a CUDA graph of <dispatcher=symm_mem> takes at most the tokens of an earlier "
                f"call ({self.most_tokens} on any rank); got {num_tokens}; first run a step of "
                "as many tokens without a CUDA graph"
            )


class _Own(torch.autograd.Function):
    """`kernels.sends_torch.take_own`, with gradients of the probabilities."""

    @staticmethod
    def forward(
        ctx: Any, probs: Tensor, chosen: Tensor, came: Tensor | None, first: int, experts: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        own: tuple[Tensor, Tensor, Tensor]
        own = select(chosen).take_own(chosen, probs, came, first, experts)
        ids, _, counts = own
        ctx.save_for_backward(ids)
        ctx.mark_non_differentiable(ids, counts)
        ctx.set_materialize_grads(False)  # of ids and counts there are none
        return own

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None, None, None]:
        (ids,), (_, of_probs, _) = ctx.saved_tensors, grads
        kept = None if of_probs is None else select(ids).zero_absent(of_probs, ids)
        return kept, None, None, None, None


def buffer_bytes(config: MoEConfig, ranks: int) -> int:
    """Return the bytes of a rank's buffer for `config.tokens` of each of `ranks`; 0: unknown.

    There is room for all tokens of all ranks, with names and probabilities of their experts; twice
    for all but the own ones where `chunked` moves them. Above GRAPH_RANKS it may be less.
    """
    tokens = config.tokens or 0
    chunked = config.overlap == "chunked" or (config.overlap == "auto" and config.in_graph)
    rows = 2 * ranks if chunked else ranks
    return rows * tokens * (2 * config.hidden_size + 12 * config.routing.topk)


def why_not(config: MoEConfig, groups: ExpertGroups, device: torch.device) -> str | None:
    """Return why this dispatcher does not work here, the same on all ranks; None where it does."""
    return _trial.why_not(groups, device, buffer_bytes(config, groups.ep_etp_size))


def build(config: MoEConfig, groups: ExpertGroups) -> SymmetricMemoryDispatcher:
    """Return the dispatcher; every rank must call it.

    Raises ConfigError when there is no group to exchange with, or it spans several hosts.
    """
    if groups.ep_etp is None:
        raise ConfigError(
            f"<dispatcher=symm_mem> needs process groups; got <ep={groups.ep_size}>, "
            f"<etp={groups.etp_size}> without one; use <dispatcher=local>"
        )
    if config.dispatch_dtype != "bf16":
        raise ConfigError(
            "<dispatcher=symm_mem> carries tokens as they are; got <dispatch_dtype> "
            f"{config.dispatch_dtype}; use <dispatcher=alltoall> or <dispatch_dtype=bf16>"
        )
    return SymmetricMemoryDispatcher(config.num_experts, groups, config.comm_sms)
