"""No overlap: route, dispatch, experts, combine run in order, each waiting for the one before."""

from ep_plugin.moe.config import MoEConfig
from ep_plugin.moe.interfaces import Block, Schedule


def build(config: MoEConfig, block: Block) -> Schedule:
    """Return the schedule; it works for every block."""
    return type(block).in_order
