"""One verb after another: dispatch, experts, combine, and then the shared expert."""

from torch import Tensor

from ep_plugin.moe.interfaces import Block, Routing, combine, compute, dispatch


def in_order(block: Block, hidden: Tensor, routing: Routing) -> tuple[Tensor, Tensor | None]:
    """Wait for each exchange where it is started."""
    tokens = hidden.reshape(-1, hidden.shape[-1])  # [T, H]
    inbox = dispatch(block.dispatcher, tokens, routing)
    output = combine(block.dispatcher, compute(block, inbox), inbox)
    return output, None if block.shared_expert is None else block.shared_expert(hidden)
