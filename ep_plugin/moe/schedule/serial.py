"""One verb after another; nothing is hidden."""

from torch import Tensor

from ep_plugin.moe.config import MoEConfig
from ep_plugin.moe.interfaces import Block, Routing, Schedule


def serial(block: Block, hidden: Tensor, routing: Routing) -> tuple[Tensor, Tensor | None]:
    """Wait for each exchange where it is started."""
    return block.in_order(hidden, routing)


def build(config: MoEConfig, block: Block) -> Schedule:
    """Return the schedule; every block will do."""
    return serial
