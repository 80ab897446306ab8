"""Public name of `moe/interfaces.py`, for routers, dispatchers and products of a user's own."""

from ep_plugin.moe.interfaces import (
    Block,
    Dispatched,
    Dispatcher,
    GroupedGemm,
    Packed,
    PeerDispatcher,
    Pending,
    Router,
    Routing,
    Schedule,
    combine,
    dispatch,
)

__all__ = [
    "Block",
    "Dispatched",
    "Dispatcher",
    "GroupedGemm",
    "Packed",
    "PeerDispatcher",
    "Pending",
    "Router",
    "Routing",
    "Schedule",
    "combine",
    "dispatch",
]
