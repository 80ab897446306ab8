"""Routing written from the papers: float64, token by token, no sorting tricks, no tensors of masks.

A logit row per token; token t is of sequence t % B, at position t // B. Randomness is passed in.
"""

import math
from dataclasses import dataclass, field, replace

import numpy as np

from ep_plugin.moe.routing_config import RoutingConfig

Array = np.ndarray


@dataclass
class Result:
    chosen: list[list[int]]  # per token and choice, before any is left out or dropped
    counted: list[list[int]]  # per token, the choices that the balancing loss counts
    ids: list[list[int]]  # per token and choice, -1 = not sent
    probs: list[list[float]]
    losses: dict[str, float] = field(default_factory=dict)


def scores_of(logits: Array, routing: RoutingConfig) -> Array:
    if routing.score_function == "sigmoid":
        return 1 / (1 + np.exp(-logits))
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def best(values: list[float], count: int) -> list[int]:
    """Indices of the `count` largest, best first; the earlier of equals."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]


def choose(
    logits: Array, scores: Array, routing: RoutingConfig, bias: Array, draws: dict[str, Array]
) -> list[list[int]]:
    chosen = []
    for t in range(len(logits)):
        ranking = list(scores[t] + bias)
        if "rsample" in draws:
            ranking = list(logits[t] + draws["rsample"][t])
        if routing.num_groups is not None:
            size = len(ranking) // routing.num_groups
            each = routing.group_score_topk or routing.topk // routing.group_topk
            tops = [
                sum(sorted(ranking[g * size : (g + 1) * size], reverse=True)[:each])
                for g in range(routing.num_groups)
            ]
            kept = best(tops, routing.group_topk)
            ranking = [value if e // size in kept else -math.inf for e, value in enumerate(ranking)]
        picks = best(ranking, routing.topk)
        if routing.second_expert == "sampling":
            noisy = [
                -math.inf if e == picks[0] or ranking[e] == -math.inf
                else logits[t][e] + draws["second"][t][e]
                for e in range(len(ranking))
            ]  # fmt: skip
            picks[1] = best(noisy, 1)[0]
        chosen.append(picks)
    return chosen


def left_out(picks: list[int], row: Array, routing: RoutingConfig, draw: float) -> bool:
    """Whether the second choice of a token is not sent."""
    second = row[picks[1]] / (row[picks[0]] + row[picks[1]])
    if routing.second_expert == "random":
        return draw >= second / routing.second_threshold
    return routing.second_expert == "threshold" and second <= routing.second_threshold


def places(num_tokens: int, num_sequences: int) -> list[int]:
    """Each token's place when listed sequence by sequence."""
    length = num_tokens // num_sequences
    return [(t % num_sequences) * length + t // num_sequences for t in range(num_tokens)]


def group_of(num_tokens: int, num_sequences: int, routing: RoutingConfig) -> list[int]:
    size = routing.group_tokens or max(num_tokens, 1)
    return [place // size for place in places(num_tokens, num_sequences)]


def capacity(tokens: int, experts: int, factor: float, routing: RoutingConfig) -> int:
    choices = tokens * (routing.topk if routing.capacity_counts_topk else 1)
    if routing.capacity_rounding == "floor":
        value = math.floor(choices * factor / experts)
    elif routing.capacity_rounding == "round":
        value = round(factor * choices / experts)
    elif routing.capacity_rounding == "ceil":
        value = math.ceil(choices / experts * factor)
    else:
        value = math.floor(choices * factor / experts) or 4
        while value % 4:
            value += 1
    return min(max(value, routing.min_capacity), tokens)


def drop(
    ids: list[list[int]],
    weights: list[list[float]],
    raw: list[list[float]],
    routing: RoutingConfig,
    factor: float,
    num_experts: int,
    num_sequences: int,
    draws: dict[str, Array],
) -> None:
    """Set to -1 what does not fit, in place: one queue for each expert of each group."""
    place = places(len(ids), num_sequences)
    group = group_of(len(ids), num_sequences, routing)

    def priority(t: int, k: int) -> tuple[float, ...]:
        return {  # random: the least draws stay, as uniform a subset as the largest
            "position": (place[t],),
            "rank_position": (k, place[t]),
            "probs": (-weights[t][k], place[t]),
            "random": (draws["random"][t][k],) if "random" in draws else (),
            "bpr": (k, -raw[t][0], place[t]),
        }[routing.drop_policy]

    for g in set(group):
        members = [t for t in range(len(ids)) if group[t] == g]
        room = capacity(len(members), num_experts, factor, routing)
        for e in range(num_experts):
            queue = [(priority(t, k), t, k) for t in members for k in range(routing.topk)
                     if ids[t][k] == e]  # fmt: skip
            for _, t, k in sorted(queue)[room:]:
                ids[t][k] = -1


def pools_of(num_tokens: int, num_sequences: int, routing: RoutingConfig) -> list[int]:
    """Which pool of the balancing loss each token is in."""
    if routing.aux_loss_scope == "sequence":
        return [t % num_sequences for t in range(num_tokens)]
    if routing.aux_loss_scope == "group":
        return group_of(num_tokens, num_sequences, routing)
    return [0] * num_tokens


def balancing_loss(
    scores: Array, counted: list[list[int]], pools: list[int], routing: RoutingConfig
) -> float:
    experts, values = scores.shape[1], []
    for pool in sorted(set(pools)):
        members = [t for t in range(len(scores)) if pools[t] == pool]
        counts = [sum(counted[t].count(e) for t in members) for e in range(experts)]
        total = 0.0
        for e in range(experts):
            mean = sum(scores[t][e] for t in members) / len(members)
            total += counts[e] / max(sum(counts), 1) * mean
        values.append(experts * total)
    return sum(values) / max(len(values), 1)


def route(
    logits: Array,
    routing: RoutingConfig,
    *,
    num_sequences: int = 1,
    training: bool = True,
    bias: Array | None = None,
    draws: dict[str, Array] | None = None,
    scores: Array | None = None,
) -> Result:
    """Route `logits` [T, E]; `draws` has what a policy needs: rsample, second, random.

    `scores` are given where tokens tie: equal logits differ in the last bit of their scores, by
    where they lie in a vector register, and that bit decides who is served first.
    """
    draws, (num_tokens, num_experts) = draws or {}, logits.shape
    bias = np.zeros(num_experts) if bias is None else bias
    exact = scores_of(logits, routing)
    scores = exact if scores is None else scores
    assert np.allclose(scores, exact, rtol=1e-13, atol=0)
    ids = choose(logits, scores, routing, bias, draws)
    chosen = [list(picks) for picks in ids]
    raw = [[scores[t][e] for e in picks] for t, picks in enumerate(ids)]
    weights = [list(row) for row in raw]
    if routing.normalize == "before_drop":
        weights = [[w / sum(row) for w in row] for row in raw]
    for t, picks in enumerate(ids):
        draw = draws["second"][t] if routing.second_expert == "random" else 0.0
        if routing.second_expert in ("random", "threshold") and left_out(
            picks, scores[t], routing, draw
        ):
            picks[1] = -1
    counted = [[e for e in picks if e >= 0] for picks in ids]
    if routing.expert_bias or routing.num_groups is not None:
        counted = [best(list(row), routing.topk) for row in scores]
    if routing.aux_loss_counts == "top1":
        counted = [picks[:1] for picks in counted]
    factor = routing.capacity_factor if training else routing.eval_capacity_factor
    if factor is not None:
        drop(ids, weights, raw, routing, factor, num_experts, num_sequences, draws)
    probs = []
    for picks, row in zip(ids, weights, strict=True):
        total = sum(w for e, w in zip(picks, row, strict=True) if e >= 0)
        by = total if routing.normalize == "after_drop" and total > 0 else 1.0
        probs.append([
            w / by * routing.scaling_factor if e >= 0 else 0.0
            for e, w in zip(picks, row, strict=True)
        ])  # fmt: skip
    losses = {}
    if training:
        pools = pools_of(num_tokens, num_sequences, routing)
        parts = scores / scores.sum(axis=1, keepdims=True)
        losses["aux"] = balancing_loss(parts, counted, pools, routing)
        losses["z"] = float(np.mean(np.log(np.exp(logits).sum(axis=1)) ** 2))
    return Result(chosen, counted, ids, probs, losses)


def expert_choice(
    scores: Array, routing: RoutingConfig, factor: float, num_sequences: int
) -> list[list[int]]:
    """Expert ids [T][E] for `scores` [T, E]: column e is e where expert e takes the token, or -1.

    Each expert takes its best tokens of each routing group, the earlier of equals.
    """
    num_tokens, num_experts = scores.shape
    place = places(num_tokens, num_sequences)
    group = group_of(num_tokens, num_sequences, routing)
    ids = [[-1] * num_experts for _ in range(num_tokens)]
    for g in set(group):
        members = [t for t in range(num_tokens) if group[t] == g]
        by_one = replace(routing, capacity_counts_topk=False)
        room = capacity(len(members), num_experts, factor, by_one)
        for e in range(num_experts):
            for t in sorted(members, key=lambda t: (-scores[t][e], place[t]))[:room]:
                ids[t][e] = e
    return ids
