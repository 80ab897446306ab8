"""Public name of `moe/config.py`, for options of a user's own."""

from ep_plugin.errors import BackendUnavailable, ConfigError
from ep_plugin.moe.config import MoEConfig
from ep_plugin.moe.routing_config import RoutingConfig

__all__ = ["BackendUnavailable", "ConfigError", "MoEConfig", "RoutingConfig"]
