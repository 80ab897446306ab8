"""Public name of `moe/groups.py`, for options of a user's own."""

from ep_plugin.moe.groups import ExpertGroups, create_expert_groups

__all__ = ["ExpertGroups", "create_expert_groups"]
