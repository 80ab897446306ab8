"""Capacity: how many tokens an expert takes from a routing group, and who goes when it is full."""

import math

import torch
from torch import Tensor

from ep_plugin.moe.routing_config import RoutingConfig


def capacity(
    num_tokens: int, num_experts: int, topk: int, factor: float, routing: RoutingConfig
) -> int:
    """Return the tokens one expert takes from a routing group of `num_tokens` tokens.

    Systems round differently: floor is Mesh TensorFlow's Switch Transformer, round is T5X's,
    floor_x4 is GShard's and GLaM's (down, then up to a multiple of 4), ceil is DeepSpeed's and
    Megatron's. The order of operations is theirs too: it decides where floats fall short of a
    whole number.
    """
    choices = num_tokens * topk if routing.capacity_counts_topk else num_tokens
    if routing.capacity_rounding == "floor":
        rounded = int(choices * factor / num_experts)
    elif routing.capacity_rounding == "round":
        rounded = round(factor * choices / num_experts)
    elif routing.capacity_rounding == "ceil":
        rounded = math.ceil(choices / num_experts * factor)
    else:
        rounded = 4 * math.ceil(max(int(choices * factor / num_experts), 1) / 4)
    return min(max(rounded, routing.min_capacity), num_tokens)


def limits(
    num_tokens: int, num_experts: int, factor: float, routing: RoutingConfig
) -> tuple[int, int, int]:
    """Return the tokens of a routing group, an expert's capacity in it, and in the last group."""
    group_tokens = min(routing.group_tokens or num_tokens, num_tokens) or 1
    last_tokens = num_tokens - (math.ceil(num_tokens / group_tokens) - 1) * group_tokens
    first, last = (
        capacity(tokens, num_experts, routing.topk, factor, routing)
        for tokens in (group_tokens, last_tokens)
    )
    return group_tokens, first, last


def capacities(
    num_tokens: Tensor, num_experts: int, topk: int, factor: float, routing: RoutingConfig
) -> Tensor:
    """Return `capacity` for each of `num_tokens` [G] int64, without waiting for the device."""
    tokens = num_tokens.double()
    choices = tokens * topk if routing.capacity_counts_topk else tokens
    if routing.capacity_rounding == "floor":
        rounded = (choices * factor / num_experts).trunc()
    elif routing.capacity_rounding == "round":
        rounded = (factor * choices / num_experts).round()
    elif routing.capacity_rounding == "ceil":
        rounded = (choices / num_experts * factor).ceil()
    else:
        rounded = 4 * ((choices * factor / num_experts).trunc().clamp(min=1) / 4).ceil()
    return rounded.clamp(min=routing.min_capacity).minimum(tokens).long()


def room(
    padding: Tensor, num_experts: int, topk: int, factor: float, routing: RoutingConfig
) -> Tensor:
    """Return an expert's capacity in each routing group [G] of the tokens that are no `padding`."""
    num_tokens = len(padding)
    group_tokens = min(routing.group_tokens or num_tokens, num_tokens) or 1
    starts = torch.arange(0, max(num_tokens, 1), group_tokens, device=padding.device)
    sizes = ((~padding).sum() - starts).clamp(0, group_tokens)
    return capacities(sizes, num_experts, topk, factor, routing)


def place_by_sequence(
    num_tokens: int, num_sequences: int, device: torch.device, padding: Tensor | None = None
) -> Tensor:
    """Return each token's place [T] when tokens are listed sequence by sequence.

    Tokens arrive position by position ([S, B, H] flattened); routing groups and "first come" go by
    sequences, as in the published systems. `padding` [T] bool takes no places: such a token has
    that of the next one which is none.
    """
    token = torch.arange(num_tokens, device=device)
    place = token
    if num_sequences > 1:
        place = token % num_sequences * (num_tokens // num_sequences) + token // num_sequences
    if padding is None:
        return place
    listed = (~padding)[place.argsort()].long()
    return (listed.cumsum(0) - listed)[place]


def keep(
    expert_ids: Tensor,
    weights: Tensor,
    first_scores: Tensor,
    draws: Tensor | None,
    place: Tensor,
    factor: float,
    num_experts: int,
    routing: RoutingConfig,
    padding: Tensor | None = None,
) -> Tensor:
    """Return which choices [T, K] bool fit their experts.

    `expert_ids` [T, K] with -1 for choices that take no room, `weights` [T, K] for the policy
    probs, `first_scores` [T] for bpr, `draws` [T, K] for random, `place` [T] of each token.
    Tokens of `padding` [T] do not count for the size of a group.
    Nothing waits for the device.
    """
    num_tokens, topk = expert_ids.shape
    group_tokens, first, last = limits(num_tokens, num_experts, factor, routing)
    num_groups = math.ceil(num_tokens / group_tokens)
    group = (place // group_tokens).unsqueeze(1).expand(-1, topk).flatten()  # [T*K]
    if padding is None:
        limit = torch.where(group == num_groups - 1, last, first)
    else:
        limit = room(padding, num_experts, topk, factor, routing)[group]
    ids = expert_ids.flatten()
    absent = num_groups * num_experts  # a bucket beside those of the experts
    bucket = torch.where(ids >= 0, group * num_experts + ids, absent)  # [T*K]
    order = _priority(weights, first_scores, draws, place, routing)  # [T*K]
    order = order[bucket[order].argsort(stable=True)]
    counts = bucket.new_zeros(absent + 1).scatter_add(0, bucket, torch.ones_like(bucket))
    starts = counts.cumsum(0) - counts
    queued = torch.arange(len(ids), device=ids.device) - starts[bucket[order]]  # place in the queue
    fits = torch.empty_like(ids, dtype=torch.bool)
    fits[order] = queued < limit[order]
    return fits.view_as(expert_ids) & (expert_ids >= 0)


def _priority(
    weights: Tensor,
    first_scores: Tensor,
    draws: Tensor | None,
    place: Tensor,
    routing: RoutingConfig,
) -> Tensor:
    """Return all choices [T*K], flattened token by token, in the order in which they are served."""
    num_tokens, topk = weights.shape
    rank = torch.arange(topk, device=weights.device).expand(num_tokens, topk)
    by_place = place.unsqueeze(1).expand(num_tokens, topk)
    keys = {  # the last key decides first
        "position": (by_place,),
        "rank_position": (by_place, rank),
        "probs": (by_place, -weights),
        "random": (by_place, draws),
        "bpr": (by_place, -first_scores.unsqueeze(1).expand(num_tokens, topk), rank),
    }[routing.drop_policy]
    order = torch.arange(num_tokens * topk, device=weights.device)
    for key in keys:
        assert key is not None
        order = order[key.flatten()[order].argsort(stable=True)]
    return order
