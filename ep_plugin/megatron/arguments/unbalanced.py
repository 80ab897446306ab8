"""Warn once about how a run balances the load of experts: what is legal and seldom meant."""

from typing import Any

from ep_plugin.megatron.arguments.theirs import several
from ep_plugin.megatron.edge_settings import EdgeSettings
from ep_plugin.megatron.settings import routing_config


def unbalanced(args: Any, settings: EdgeSettings) -> str | None:
    """Return the warning if validated `args` train without any balancing, else None.

    Or the warning that its losses have another strength than without `--calculate-per-token-loss`.

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
        return _other_strength(args) if routing.balancing_losses else None
    is_off = several(args.moe_router_load_balancing_type) == ["none"]
    loss = "--moe-router-load-balancing-type aux_loss " if is_off else ""
    return (
        "no balancing loss: nothing keeps tokens from crowding into a few experts; use "
        f"{loss}--moe-aux-loss-coeff 1e-2"
    )


def _other_strength(args: Any) -> str | None:
    """Return the warning where `block/strength.py` cannot know the counted tokens in time."""
    stages = args.pipeline_model_parallel_size > 1
    if not (args.calculate_per_token_loss and args.overlap_moe_expert_parallel_comm and stages):
        return None
    return (
        "auxiliary losses weigh by all tokens, masked ones too, as Megatron's do under "
        "--calculate-per-token-loss with --overlap-moe-expert-parallel-comm over several pipeline "
        "stages; to weigh by the counted ones, leave out --overlap-moe-expert-parallel-comm"
    )
