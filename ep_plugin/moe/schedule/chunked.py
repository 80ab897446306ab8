"""Overlap inside one layer and one micro-batch: tokens are computed while others still travel.

A rank's own tokens need no exchange, so it computes them first. The tokens of the other ranks come
in chunks. For 3 ranks, with the two others in two chunks, forward and backward are:

    network   dispatch 1 | dispatch 2 |            | combine 1 | combine 2
    compute   own, fc1 | chunk 1 | chunk 2 | own, fc2

    network   gradients 1 | gradients 2 |    | token gradients 1, 2
    compute   own           | chunk 1 | chunk 2 | weight gradients

In the backward the gradients of a chunk's rows are computed when the chunk arrives. The weight
gradients are computed once, at the end, over all rows in the order of `serial`. No sum is taken in
another order, so every result has the bits of `serial`. A chunk with more rows than its share of a
rank's capacity is an exception: then each chunk adds its own weight gradients, in fp32.

With dispatcher `alltoall` a chunk's token gradients are sent before the next chunk is computed.
With `symm_mem` they are sent after all chunks: its copy engines are fast enough, and no rows need
to be copied to join the chunks. With one rank there is nothing to overlap; the order is `serial`'s.

Host syncs: those of the dispatcher's `pack`; with `symm_mem` none while a CUDA graph is captured.
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

DEFAULT_CHUNKS = 2  # of the other ranks, if there are at least two


def chunked(
    num_chunks: int, block: Block, hidden: Tensor, routing: Routing
) -> tuple[Tensor, Tensor | None]:
    """Compute the own tokens while others travel, then the others chunk by chunk.

    `hidden` is [S, B, H] or [T, H]. Returns the experts' output [T, H], and that of the shared
    expert, in the shape of `hidden`, or None.
    """
    dispatcher = cast(PeerDispatcher, block.dispatcher)  # `build` has checked
    experts = cast(Experts, block.experts)
    packed = dispatcher.pack(hidden.reshape(-1, hidden.shape[-1]), routing)
    trip = Trip(dispatcher, packed, num_chunks)
    weights = experts.linear_fc1(), experts.linear_fc2()
    inbox = packed.complete(packed.outgoing.new_empty(0))
    ids, probs = (tensor.roll(-trip.shift, 0) for tensor in (inbox.expert_ids, inbox.probs))
    config = experts.config
    recipes = experts.recipes(experts.keep().at_once(ids.numel()))
    call = Call(
        *(trip, ids, probs.detach(), inbox.tokens_per_expert, config.activation, recipes),
        {leg: experts.keep((len(leg.distances) or 1) / trip.size) for leg in trip.legs},
        *(experts.totals, dispatcher.wire_format),
    )
    wanted = probs if packed.probs is None else packed.probs
    returned: Tensor = ChunkedExperts.apply(packed.outgoing, wanted, *weights, call)
    output = dispatcher.unpack(returned, inbox)
    return output, None if block.shared_expert is None else block.shared_expert(hidden)


def exchange_alone(
    dispatcher: PeerDispatcher, hidden: Tensor, routing: Routing
) -> tuple[Dispatched, Tensor]:
    """Dispatch `hidden` [T, H] and bring it back without computing anything.

    Returns the `Dispatched` record without tokens, and what came back [T, H]. The dispatcher must
    be one that sends all tokens to all ranks.
    """
    packed = dispatcher.pack(hidden, routing)
    inbox = packed.complete(packed.outgoing.new_empty(0))
    trip = Trip(dispatcher, packed, 1)
    returned: Tensor = ThereAndBack.apply(packed.outgoing, packed.probs, trip)
    return inbox, dispatcher.unpack(returned, inbox)


def build(config: MoEConfig, block: Block) -> Schedule:
    """Return the schedule; raises ConfigError for a bias, dispatcher or chunks it cannot do."""
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
    """Raise ConfigError if the exchange with `others` other ranks of ep*etp cannot be in chunks.

    `replicas` is the number of tp ranks that hold the same tokens; None if no two ranks do.
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
