"""Expert parallelism for an existing LLM training stack.

Four storeys, each using those before it: `moe` is the layer, `checkpoint` reads and writes files,
`megatron` is the edge to Megatron, `commands` is what `ep-plugin` runs. Read `moe/interfaces.py`
and `moe/layer.py` first. Importing this package imports nothing heavy: public names load on first
use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ep_plugin.errors import ConfigError
    from ep_plugin.moe.config import MoEConfig
    from ep_plugin.moe.groups import ExpertGroups, create_expert_groups
    from ep_plugin.moe.layer import MoELayer
    from ep_plugin.moe.parallel import ParallelConfig
    from ep_plugin.moe.routing_config import RoutingConfig

__version__ = "0.2.0"
__all__ = [
    "ConfigError",
    "ExpertGroups",
    "MoEConfig",
    "MoELayer",
    "ParallelConfig",
    "RoutingConfig",
    "create_expert_groups",
]

_HOME = {
    "ConfigError": "errors",
    "MoEConfig": "moe.config",
    "RoutingConfig": "moe.routing_config",
    "ParallelConfig": "moe.parallel",
    "ExpertGroups": "moe.groups",
    "create_expert_groups": "moe.groups",
    "MoELayer": "moe.layer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ep_plugin' has no attribute {name!r}")
    return getattr(import_module(f"ep_plugin.{_HOME[name]}"), name)
