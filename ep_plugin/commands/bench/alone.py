"""What a layer over several ranks consists of, each part by itself."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ep_plugin.commands.bench.accumulate import WeightGradients
from ep_plugin.commands.bench.case import SETS, Case
from ep_plugin.commands.bench.covered import spans_of
from ep_plugin.commands.bench.measure import Protocol
from ep_plugin.moe.e4m3 import whole_blocks
from ep_plugin.moe.interfaces import Dispatched, Routing, combine, dispatch
from ep_plugin.moe.layer import MoELayer
from ep_plugin.moe.schedule.chunked import exchange_alone


@dataclass(frozen=True)
class Wire:
    """What moves rows between GPUs in a step: two exchanges forward, two backward."""

    ms: float  # of the kernels
    num_bytes: float  # of tokens and their gradients that leave this rank


def goes_by_swaps(layer: MoELayer) -> bool:
    """Whether the schedule has rows go another way than the dispatcher's own."""
    return layer.config.overlap == "chunked" and layer.config.dispatcher == "symm_mem"


class Alone:
    """Exchange and computation of `layer`, each a step of its own, forward and backward."""

    def __init__(self, layer: MoELayer, case: Case, weights: WeightGradients) -> None:
        self.layer, self.case, self.weights = layer, case, weights
        self.by_swaps = goes_by_swaps(layer)  # then that way is measured
        self.routings = [self._routing(tokens) for tokens in case.tokens]
        self.inboxes = [self._received(index) for index in range(SETS)]
        self.grads = [torch.randn_like(inbox.tokens) for inbox in self.inboxes]

    def exchange(self, index: int) -> None:
        """Dispatch and combine; experts return the tokens they get."""
        tokens, routing = self.case.tokens[index], self.routings[index]
        routing = replace(routing, probs=routing.probs.detach().requires_grad_())
        inbox, returned = self._there_and_back(tokens, routing)
        # The experts' gradients of probabilities travel home beside those of tokens.
        probs = [inbox.probs] if inbox.probs.requires_grad else []
        grads = self.case.grads[index], *map(torch.ones_like, probs)
        torch.autograd.backward((returned, *probs), grads)
        self._forget(tokens)

    def _there_and_back(self, tokens: Tensor, routing: Routing) -> tuple[Dispatched, Tensor]:
        dispatcher: Any = self.layer.dispatcher
        if not self.by_swaps:
            inbox = dispatch(dispatcher, tokens, routing)
            return inbox, combine(dispatcher, inbox.tokens, inbox)
        return exchange_alone(dispatcher, tokens, routing)

    def compute(self, index: int) -> None:
        """Router and experts, on tokens that were received before."""
        tokens, inbox = self.case.tokens[index], self.inboxes[index]
        self.weights.start()
        probs = self.layer.router(tokens).probs
        outbox = self.layer.experts(inbox)
        grads = self.grads[index], torch.ones_like(probs)
        torch.autograd.backward((outbox, probs), grads)
        self.weights.finish(tokens, inbox.tokens, inbox.probs)

    def wire(self, protocol: Protocol) -> Wire | None:
        """Return the mean over the sets of buffers; None on the CPU. All ranks must call it."""
        if protocol.device.type != "cuda":
            return None
        spans = spans_of(self.exchange, protocol)
        microseconds = sum(span.end - span.start for span in spans if span.is_wire)
        leaving = sum(self._bytes_leaving(routing) for routing in self.routings)
        return Wire(microseconds / 1e3 / SETS, leaving / SETS)

    def _bytes_leaving(self, routing: Routing) -> float:
        """Return the bytes of tokens that leave in one step, gradients included."""
        config, groups = self.layer.config, self.layer.groups
        hosts = routing.expert_ids // (config.num_experts // groups.ep_size)  # [T, K]
        others = [rank for rank in range(groups.ep_size) if rank != groups.ep_rank]
        once = config.dispatcher != "alltoall" or config.dispatch_dedup
        sent = [hosts == rank for rank in others]
        rows = sum(int((here.any(1) if once else here).sum()) for here in sent)
        if self.by_swaps:  # all of them, to all ranks
            rows = len(hosts) * len(others)
        hidden = config.hidden_size
        there = 2.0 * hidden
        if config.dispatch_dtype == "fp8":
            whole = whole_blocks(hidden)
            there = whole + whole / 32 if config.fp8 == "blockwise" else hidden + 4.0
        return rows * (there + 3 * 2.0 * hidden)

    @torch.no_grad()
    def _routing(self, tokens: Tensor) -> Routing:
        routing: Routing = self.layer.router(tokens.detach())
        return routing

    @torch.no_grad()
    def _received(self, index: int) -> Dispatched:
        inbox = dispatch(self.layer.dispatcher, self.case.tokens[index], self.routings[index])
        with torch.enable_grad():
            leaves: dict[str, Any] = {
                name: getattr(inbox, name).detach().requires_grad_() for name in ("tokens", "probs")
            }
        return replace(inbox, **leaves)

    def _forget(self, *tensors: Tensor) -> None:
        for tensor in (*tensors, *self.layer.parameters()):
            tensor.grad = None
