"""Public name of `moe/router/topk.py`, for a router of a user's own that goes on from it."""

from ep_plugin.moe.router.topk import TopKRouter, build

__all__ = ["TopKRouter", "build"]
