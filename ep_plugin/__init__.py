"""Expert parallelism for an existing LLM training stack.

`contracts.py` defines the words, `layer.py` the path of a token; `megatron/` is the edge to
Megatron. Importing this package imports nothing heavy: public names load on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ep_plugin.config import MoEConfig
    from ep_plugin.errors import ConfigError
    from ep_plugin.groups import ExpertGroups, create_expert_groups
    from ep_plugin.layer import MoELayer
    from ep_plugin.parallel import ParallelConfig
    from ep_plugin.routing_config import RoutingConfig

__version__ = "0.1.0"
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
    "MoEConfig": "config",
    "RoutingConfig": "routing_config",
    "ParallelConfig": "parallel",
    "ExpertGroups": "groups",
    "create_expert_groups": "groups",
    "MoELayer": "layer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ep_plugin' has no attribute {name!r}")
    return getattr(import_module(f"ep_plugin.{_HOME[name]}"), name)
