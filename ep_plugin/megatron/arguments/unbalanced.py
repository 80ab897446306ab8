"""Warn once about how a run balances the load of experts: what is legal and seldom meant."""

from typing import Any

from ep_plugin.megatron.arguments.theirs import several
from ep_plugin.megatron.edge_settings import EdgeSettings
from ep_plugin.megatron.settings import routing_config


def unbalanced(args: Any, settings: EdgeSettings) -> str | None:
    """Return the warning if validated `args` train without any balancing, else None.

    There is no warning for routers other than `topk`: they balance by themselves, or are the
    user's own.
    """
    if settings.router != "topk" or getattr(args, "skip_train", False):
        return None
    routing = routing_config(args, settings)
    balances = (
        routing.balancing_losses,
        routing.expert_bias,
        routing.quantile_balancing,
        routing.force_load_balancing,
        routing.topk >= args.num_experts,  # every expert takes every token
    )
    if any(balances):
        return None
    is_off = several(args.moe_router_load_balancing_type) == ["none"]
    loss = "--moe-router-load-balancing-type aux_loss " if is_off else ""
    return (
        "no balancing loss: nothing keeps tokens from crowding into a few experts; use "
        f"{loss}--moe-aux-loss-coeff 1e-2"
    )
