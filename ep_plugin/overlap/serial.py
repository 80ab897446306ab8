"""One verb after another: dispatch, experts, combine, and then the shared expert."""

from torch import Tensor

from ep_plugin.config import MoEConfig
from ep_plugin.contracts import Block, Routing, Schedule, combine, dispatch
from ep_plugin.overlap._compute import compute


def serial(block: Block, hidden: Tensor, routing: Routing) -> tuple[Tensor, Tensor | None]:
    """Wait for each exchange where it is started."""
    tokens = hidden.reshape(-1, hidden.shape[-1])  # [T, H]
    inbox = dispatch(block.dispatcher, tokens, routing)
    output = combine(block.dispatcher, compute(block, inbox), inbox)
    return output, None if block.shared_expert is None else block.shared_expert(hidden)


def build(config: MoEConfig, block: Block) -> Schedule:
    """Return the schedule; every block will do."""
    return serial
