"""Exchanges hidden inside one layer and one micro-batch: what is here first is computed first.

A rank's own tokens need no exchange. For 3 ranks with the others in two chunks:

    network   dispatch 1 | dispatch 2 |            | combine 1 | combine 2
    compute   own, fc1 | chunk 1 | chunk 2 | own, fc2

    network   gradients 1 | gradients 2 |    | token gradients 1, 2
    compute   own           | chunk 1 | chunk 2 | weight gradients

In the backward each part's rows get their gradients as they come, and the weights theirs once, last
of all and over all rows in the order of `serial`: no sum is taken in another order, so no result
differs. Through `alltoall` a part's token gradients set out before the next part is computed.
Through `symm_mem` copy engines are fast enough to wait for all parts, and there is less to compute:
no row is moved to join parts. With one rank there is nothing to hide and the order is `serial`'s.

Host syncs: those of the dispatcher's `pack`; through `symm_mem` none while a graph is captured.
"""

from functools import partial
from typing import cast

from torch import Tensor

from ep_plugin.errors import ConfigError
from ep_plugin.moe.config import MoEConfig
from ep_plugin.moe.experts.experts import Experts
from ep_plugin.moe.interfaces import Block, Dispatched, PeerDispatcher, Routing, Schedule
from ep_plugin.moe.schedule._chunked_experts import Call, ChunkedExperts, ThereAndBack
from ep_plugin.moe.schedule._trip import Trip

DEFAULT_CHUNKS = 2  # of the other ranks, where there are as many


def chunked(
    num_chunks: int, block: Block, hidden: Tensor, routing: Routing
) -> tuple[Tensor, Tensor | None]:
    """Compute the own tokens while others travel, and the others' part by part."""
    dispatcher = cast(PeerDispatcher, block.dispatcher)  # `build` has checked
    experts = cast(Experts, block.experts)
    packed = dispatcher.pack(hidden.reshape(-1, hidden.shape[-1]), routing)
    trip = Trip(dispatcher, packed, num_chunks)
    weights = experts.linear_fc1(), experts.linear_fc2()
    inbox = packed.complete(packed.outgoing.new_empty(0))
    ids, probs = (tensor.roll(-trip.shift, 0) for tensor in (inbox.expert_ids, inbox.probs))
    config = experts.config
    recipes = experts.recipes(ids.numel())
    call = Call(
        *(trip, ids, probs.detach(), inbox.tokens_per_expert, config.activation, recipes),
        *(config.save, experts.totals, dispatcher.wire_format),
    )
    wanted = probs if packed.probs is None else packed.probs
    returned: Tensor = ChunkedExperts.apply(packed.outgoing, wanted, *weights, call)
    output = dispatcher.unpack(returned, inbox)
    return output, None if block.shared_expert is None else block.shared_expert(hidden)


def exchange_alone(
    dispatcher: PeerDispatcher, hidden: Tensor, routing: Routing
) -> tuple[Dispatched, Tensor]:
    """Return what `hidden` [T, H] is dispatched as, without tokens, and itself, there and back.

    The dispatcher must send all tokens to all ranks.
    """
    packed = dispatcher.pack(hidden, routing)
    inbox = packed.complete(packed.outgoing.new_empty(0))
    trip = Trip(dispatcher, packed, 1)
    returned: Tensor = ThereAndBack.apply(packed.outgoing, packed.probs, trip)
    return inbox, dispatcher.unpack(returned, inbox)


def build(config: MoEConfig, block: Block) -> Schedule:
    """Return the schedule; raises ConfigError for biases, dispatchers, or chunks it cannot take."""
    others, replicas = block.groups.ep_etp_size - 1, block.groups.replicas
    check_ranks(config, others, None if replicas is None else replicas.size())
    if not others:
        return type(block).in_order
    if not isinstance(block.dispatcher, PeerDispatcher):
        raise ConfigError(
            "<overlap> (chunked) needs a dispatcher that exchanges with some ranks at a time, and "
            f"<dispatcher> ({config.dispatcher}) does not; use "
            "<dispatcher=alltoall> or <overlap=serial>"
        )
    return partial(chunked, config.overlap_chunks or min(DEFAULT_CHUNKS, others))


def check_ranks(config: MoEConfig, others: int, replicas: int | None) -> None:
    """Raise ConfigError for what cannot be exchanged with `others` ranks of ep*etp in parts.

    `replicas` is how many ranks of tp hold the same tokens; None: no two do.
    """
    if config.bias:
        raise ConfigError(
            "<overlap> (chunked) needs experts without bias; got <bias=True>; use <overlap=serial> "
            "or <bias=False>"
        )
    if not others:
        return
    if replicas is not None:
        raise ConfigError(
            f"<overlap> (chunked) exchanges part by part, and the {replicas} ranks of tp that hold "
            "the same tokens gather theirs; use sequence parallelism or <overlap=serial>"
        )
    if config.overlap_chunks is not None and config.overlap_chunks > others:
        raise ConfigError(
            f"<overlap_chunks> ({config.overlap_chunks}) must be at most the other ranks of ep*etp "
            f"({others}); use <overlap_chunks={others}>"
        )
