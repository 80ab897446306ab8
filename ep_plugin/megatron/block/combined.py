"""The steps of our block that Megatron's combined 1F1B schedule runs one by one.

With `--overlap-moe-expert-parallel-comm` Megatron runs the forward of one micro-batch between the
backward of another, layer by layer, exchanges on a stream of their own:

    network   combine (b)        | dispatch (f), dispatch (b) | combine (f)
    compute   pre-dispatch (f)   | experts (b), experts (f)   | pre-dispatch (b)

    step            methods of the layer                          what runs here
    pre-dispatch    shared_experts_compute, route, preprocess     shared expert, router
    dispatch        dispatch                                      start_dispatch, wait
    experts         routed_experts_compute                        experts
    combine         combine, postprocess                          start_combine, wait

Each step has an autograd graph of its own, cut where the next begins: what has a gradient goes from
step to step through Megatron, all else is kept in the layer's `under_way`. One is enough, since the
forward of a layer ends before the next begins, and a backward reads what autograd has kept.

Megatron frees what went into dispatch, experts and combine when the step is done, by emptying its
storage. So tokens and probabilities, which the router keeps for its backward, are copied before
dispatch: 4 H bytes of memory traffic a token in bf16. And what was received stays here, represented
by a tensor without values.

A layer of the adapter binds these functions as its methods: `block` is an EPMoELayer.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ep_plugin.moe.experts.fused import parts_of
from ep_plugin.moe.interfaces import Dispatched, Routing
from ep_plugin.moe.watch.place import Phase


@dataclass(frozen=True)
class UnderWay:
    """What one micro-batch's forward keeps between its steps."""

    shape: torch.Size  # [S, B, H]
    routing: Routing
    inbox: Dispatched | None = None  # without gradients


def shared_experts_compute(block: Any, hidden: Tensor) -> Tensor | None:
    """Return what the shared expert makes of `hidden` [S, B, H]; None without one."""
    shared: Tensor | None = block._shared(hidden) if block.use_shared_expert else None
    return shared


def route(block: Any, hidden: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Routing]:
    """Return probabilities [T, K] and the routing, which Megatron hands on as it is.

    `padding_mask` [S, B] bool, as Megatron's own; its combined schedule never gives one.
    """
    routing: Routing = block.route_tokens(hidden, padding_mask)
    return routing.probs, routing


def preprocess(
    block: Any, hidden: Tensor, probs: Tensor, routing: Routing
) -> tuple[Tensor, Tensor]:
    """Return copies of the tokens [T, H] and of `probs` [T, K], which Megatron may free."""
    block.under_way = UnderWay(hidden.shape, routing)
    return hidden.reshape(-1, hidden.shape[-1]).clone(), probs.clone()


def dispatch(block: Any, tokens: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
    """Return what stands for the tokens received [N, H], and their probabilities [N, C]."""
    routing = replace(block.under_way.routing, probs=probs)
    block.layer.place.enter(Phase.DISPATCH)
    inbox = block.layer.dispatcher.start_dispatch(tokens, routing).wait()
    kept = replace(inbox, tokens=inbox.tokens.detach(), probs=inbox.probs.detach())
    block.under_way = replace(block.under_way, inbox=kept)
    return _StandIn.apply(inbox.tokens), inbox.probs


def routed_experts_compute(block: Any, stand_in: Tensor, probs: Tensor) -> tuple[Tensor, None]:
    """Return what the experts make of the tokens received: [N, H], no bias."""
    inbox: Dispatched = block.under_way.inbox
    if probs.is_cuda:  # made on the exchanges' stream, not to be reused before this one is done
        used = (inbox.tokens, probs, inbox.expert_ids, inbox.tokens_per_expert)
        for tensor in (*used, *parts_of(inbox.tokens8)):
            tensor.record_stream(torch.cuda.current_stream())
    tokens = _Behind.apply(stand_in, inbox.tokens)
    outbox = block.layer.compute(replace(inbox, tokens=tokens, probs=probs))
    without_tokens = replace(inbox, tokens=inbox.tokens.new_empty(0), tokens8=None)
    block.under_way = replace(block.under_way, inbox=without_tokens)
    return outbox, None


def combine(block: Any, outbox: Tensor) -> Tensor:
    """Bring `outbox` [N, H] home and sum per token: [T, H]."""
    block.layer.place.enter(Phase.COMBINE)
    returned: Tensor = block.layer.dispatcher.start_combine(outbox, block.under_way.inbox).wait()
    return returned


def postprocess(block: Any, returned: Tensor, shared: Tensor | None) -> Tensor:
    """Return the layer's output [S, B, H]."""
    shape, block.under_way = block.under_way.shape, None
    output = returned.view(shape)
    return output if shared is None else output + shared


class _StandIn(torch.autograd.Function):
    """A tensor without values in place of `tokens` [N, H]; the gradient is that of the tokens."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor) -> Tensor:
        return tokens.new_zeros(()).expand(tokens.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


class _Behind(torch.autograd.Function):
    """The `tokens` [N, H] that `stand_in` stands for; it gets their gradient."""

    @staticmethod
    def forward(ctx: Any, stand_in: Tensor, tokens: Tensor) -> Tensor:
        return tokens.view_as(tokens)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None
