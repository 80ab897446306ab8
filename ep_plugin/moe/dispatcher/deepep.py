"""Dispatch by DeepEP's kernels for one host (`deep_ep.Buffer`), over NVLink.

Written to the interface of DeepEP 1.2, with which it ran on two GPUs; CI tests it on CPU ranks
against a stand-in of that interface.

A token goes once to each rank that hosts any of its experts, the experts' names and probabilities
beside it; on the way back DeepEP sums a token's rows over ranks. For 2 ranks x 2 local experts,
rank 0 with tokens a b, rank 1 with c, that chose (E0 E2) (E0 E1) (E3 E2):

    rank 0 receives    a b         local experts  0 - | 0 1
    rank 1 receives    a c                        - 0 | 1 0       (- means another rank's)

Dispatch and combine are each other's backward, with the layout that the dispatch has found. All run
on DeepEP's own stream; `start_dispatch` and `start_combine` return at once, and what is computed
before the wait hides them. A backward is waited for where it is started.

Takes bf16 tokens on 2, 4 or 8 ranks of one host, etp = 1. `dispatch_dedup` changes nothing here,
and how many SMs it runs on is DeepEP's choice. One buffer serves all layers of the groups.

Host syncs: one per dispatch, in which DeepEP waits for the number of rows received; none in combine
and in both backwards.
"""

from typing import Any

import torch
from deep_ep import Buffer, topk_idx_t
from torch import Tensor

from ep_plugin.errors import ConfigError
from ep_plugin.moe.config import MoEConfig
from ep_plugin.moe.dispatcher._one_host import check_one_host
from ep_plugin.moe.groups import ExpertGroups
from ep_plugin.moe.interfaces import Dispatched, Pending, Routing
from ep_plugin.moe.rows import count_choices
from ep_plugin.moe.watch.place import enter_backward, here, leave_backward

RANKS = (2, 4, 8)  # that the kernels are compiled for
STEP, MOST_HIDDEN = 16, 8176  # the hidden sizes they take: multiples, up to
MOST_CHOICES = 32  # of a token
MOST_EXPERTS = 128  # of a rank


class _Trip:
    """One dispatch, with the layout that its way back and both backwards use.

    `event` is to be waited for before what was started last is read.
    """

    def __init__(self, buffer: Any, num_experts: int) -> None:
        self.buffer, self.num_experts = buffer, num_experts
        self.layout: Any = None
        self.event: Any = None

    def out(self, hidden: Tensor, ids: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Start sending tokens, names and probabilities; return what stands for those received."""
        ids = ids.to(topk_idx_t).contiguous()
        per_rank, per_node, per_expert, in_rank, _ = self.buffer.get_dispatch_layout(
            ids, self.num_experts
        )
        tokens, received_ids, received_probs, _, self.layout, self.event = self.buffer.dispatch(
            hidden.contiguous(),
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            topk_idx=ids,
            topk_weights=probs.contiguous(),
            async_finish=True,
        )
        return tokens, received_ids, received_probs

    def out_again(self, rows: Tensor) -> Tensor:
        """Send `rows` [T, H] as the tokens went; the current stream waits."""
        received: Tensor = self.buffer.dispatch(rows.contiguous(), handle=self.layout)[0]
        return received

    def home(
        self, rows: Tensor, probs: Tensor | None = None, later: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Sum `rows` [N, H], and `probs` [N, C], over ranks: [T, H] and [T, C].

        The current stream waits, or `event` is to be waited for `later`.
        """
        summed, summed_probs, event = self.buffer.combine(
            rows.contiguous(),
            self.layout,
            topk_weights=None if probs is None else probs.contiguous(),
            async_finish=later,
        )
        if later:
            self.event = event
        return summed, summed_probs


class DeepEPDispatcher:
    """Sends each token to the ranks that host its experts, and sums what they send back."""

    def __init__(self, num_experts: int, groups: ExpertGroups, hidden_size: int) -> None:
        self.num_experts, self.experts = num_experts, num_experts // groups.ep_size
        self.buffer = _shared_buffer(groups, hidden_size)

    def start_dispatch(self, hidden: Tensor, routing: Routing) -> Pending[Dispatched]:
        """As `Dispatcher` says; raises ConfigError for tokens in another dtype than bf16."""
        if hidden.dtype != torch.bfloat16:
            raise ConfigError(
                f"<dispatcher=deepep> carries tokens in bfloat16; got {hidden.dtype}; use a layer "
                "in bfloat16 or <dispatcher=alltoall>"
            )
        trip = _Trip(self.buffer, self.num_experts)
        tokens, ids, probs = _Dispatch.apply(hidden, routing.probs, routing.expert_ids, trip)

        def wait() -> Dispatched:
            trip.event.current_stream_wait()
            return received(tokens, ids, probs, self.experts, trip)

        return Pending(wait)

    def start_combine(self, outbox: Tensor, inbox: Dispatched) -> Pending[Tensor]:
        trip: _Trip = inbox.handle
        summed: Tensor = _Combine.apply(outbox, trip)

        def wait() -> Tensor:
            trip.event.current_stream_wait()
            return summed

        return Pending(wait)


def received(tokens: Tensor, ids: Tensor, probs: Tensor, experts: int, handle: Any) -> Dispatched:
    """Return what DeepEP delivered as our record: `ids` [N, C] are local, -1 for others'."""
    expert_ids = ids.long()
    probs = probs.where(expert_ids >= 0, 0)  # and no gradient for a choice that is not here
    return Dispatched(tokens, expert_ids, probs, count_choices(expert_ids, experts), handle)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, probs: Tensor, expert_ids: Tensor, trip: _Trip
    ) -> tuple[Tensor, ...]:
        ctx.trip, ctx.place = trip, here.code
        tokens, ids, received_probs = trip.out(hidden, expert_ids, probs)
        ctx.mark_non_differentiable(ids)
        return tokens, ids, received_probs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        enter_backward(ctx.place)
        hidden, probs = ctx.trip.home(grads[0], grads[2])
        leave_backward(ctx.place)
        return hidden, probs, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, outbox: Tensor, trip: _Trip) -> Tensor:
        ctx.trip, ctx.place = trip, here.code
        return trip.home(outbox, later=True)[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        enter_backward(ctx.place)
        rows = ctx.trip.out_again(grads[0])
        leave_backward(ctx.place)
        return rows, None


def _shared_buffer(groups: ExpertGroups, hidden_size: int) -> Any:
    """Return the buffer of `groups.ep`, the same for every layer that is given `groups`."""
    group, size = groups.ep, groups.ep_size
    configs = Buffer.get_dispatch_config(size), Buffer.get_combine_config(size)
    num_bytes = max(c.get_nvl_buffer_size_hint(2 * hidden_size, size) for c in configs)
    found = groups.shared.get("deepep")
    if found is None or found.group is not group or found.num_nvl_bytes < num_bytes:
        found = groups.shared["deepep"] = Buffer(group, num_bytes)
    return found


def build(config: MoEConfig, groups: ExpertGroups) -> DeepEPDispatcher:
    """Return the dispatcher; every rank must call it.

    Raises ConfigError for what DeepEP's kernels for one host do not take.
    """
    hidden, routing, alltoall = config.hidden_size, config.routing, "<dispatcher=alltoall>"
    local = config.num_experts // groups.ep_size
    sizes = f"a hidden_size that is a multiple of {STEP}, {MOST_HIDDEN} at most"
    rules: list[tuple[bool, str, Any, str]] = [  # whether it is met, rule, value, what to use
        (groups.ep_etp is not None, "process groups", None, "<dispatcher=local>"),
        (groups.etp_size == 1, "<etp=1>", groups.etp_size, alltoall),
        (groups.ep_size in RANKS, f"ep in {RANKS}", groups.ep_size, alltoall),
        (config.dispatch_dtype == "bf16", "<dispatch_dtype=bf16>", config.dispatch_dtype, alltoall),
        (hidden % STEP == 0 and hidden <= MOST_HIDDEN, sizes, hidden, alltoall),
        (routing.topk <= MOST_CHOICES, f"topk <= {MOST_CHOICES}", routing.topk, alltoall),
        (local <= MOST_EXPERTS, f"at most {MOST_EXPERTS} experts of a rank", local, alltoall),
        (
            *(routing.router_dtype != "fp64", "probabilities in fp32"),
            *(routing.router_dtype, "<router_dtype=fp32>"),
        ),
    ]
    for is_met, rule, value, instead in rules:
        if not is_met:
            raise ConfigError(f"<dispatcher=deepep> needs {rule}; got {value}; use {instead}")
    assert groups.ep is not None
    check_one_host(groups.ep, "deepep")
    return DeepEPDispatcher(config.num_experts, groups, config.hidden_size)
