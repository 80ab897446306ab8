"""Whether Megatron divides a token's weights by their sum, from its own settings. No torch."""

from typing import Any


def divided(score_function: str, pre_softmax: bool, topk: int) -> bool:
    """Return whether weights are divided: softmax over the chosen alone sums to 1, too."""
    return not pre_softmax if score_function == "softmax" else topk > 1


def normalize_of(config: Any) -> str:
    """Return the `normalize` that Megatron's arguments, or its configuration, stand for."""
    score_function = config.moe_router_score_function
    pre_softmax = score_function == "softmax" and config.moe_router_pre_softmax
    found = divided(score_function, pre_softmax, config.moe_router_topk)
    return "before_drop" if found else "none"
