"""One verb after another; nothing is hidden."""

from ep_plugin.moe.config import MoEConfig
from ep_plugin.moe.interfaces import Block, Schedule
from ep_plugin.moe.schedule._in_order import in_order


def build(config: MoEConfig, block: Block) -> Schedule:
    """Return the schedule; every block will do."""
    return in_order
