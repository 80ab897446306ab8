"""Which experts a token chooses, and with what weight."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ep_plugin.moe.router import _random
from ep_plugin.moe.router._losses import Pools
from ep_plugin.moe.routing_config import RoutingConfig

NEVER = float("-inf")


class Choice(Protocol):
    """What every token chose, before capacity, and what losses and metrics sum over tokens."""

    @property
    def expert_ids(self) -> Tensor:
        """[T, K] int64, best first; -1 = left out by the second-expert policy."""
        ...

    @property
    def weights(self) -> Tensor:
        """[T, K] scores without bias or noise, divided by their sum if before_drop."""
        ...

    @property
    def first_scores(self) -> Tensor:
        """[T] score of the first choice, before any division."""
        ...

    @property
    def sent_ids(self) -> Tensor | None:
        """[T, K] int64 as `expert_ids`, -1 = no room, where capacity is taken into account already.

        Then `weights` are 0 there.
        """
        ...

    @property
    def sent(self) -> Tensor | None:
        """[E] int64 choices with room at each expert, where they are counted already."""
        ...

    @property
    def own_loss(self) -> Tensor | None:
        """[] balancing loss over this rank's tokens, where it is known already."""
        ...

    def score_sums(self, pools: Pools) -> Tensor:
        """Return the sums [P, E] of scores, of each token's parts of 1; they have a gradient."""
        ...

    def counts(self, pools: Pools) -> Tensor:
        """Return [P, E + 1] int64: choices that the balancing loss counts, then tokens."""
        ...

    def z_loss(self) -> Tensor:
        """Return the mean of logsumexp(logits)^2 [] (ST-MoE, arXiv:2202.08906, eq. 5).

        Over all tokens; those of padding are 0.
        """
        ...

    def sums(self) -> tuple[Tensor, Tensor]:
        """Return entropy [] in nats and largest score [], each summed over tokens."""
        ...


@dataclass(frozen=True)
class PlainChoice:
    """The twin of `FusedChoice`, in plain torch: every policy, any device and dtype."""

    expert_ids: Tensor
    weights: Tensor
    first_scores: Tensor
    logits: Tensor  # [T, E]
    scores: Tensor  # [T, E] softmax or sigmoid
    routing: RoutingConfig
    padding: Tensor | None = None  # [T] bool: tokens that choose nothing and count for nothing
    sent_ids: None = None
    sent: None = None
    own_loss: None = None

    def score_sums(self, pools: Pools) -> Tensor:
        return pools.sum(self._parts())

    def counts(self, pools: Pools) -> Tensor:
        routing, expert_ids = self.routing, self.expert_ids
        if routing.expert_bias or routing.num_groups is not None:
            # DeepSeek-V3 (arXiv:2412.19437, eq. 18) counts by affinity, without bias or groups.
            expert_ids = self.scores.topk(routing.topk, dim=1).indices
        counted = expert_ids[:, :1] if routing.aux_loss_counts == "top1" else expert_ids
        return pools.count(counted, self.scores.shape[1])

    def z_loss(self) -> Tensor:
        squares = self._counting(self.logits.logsumexp(dim=-1).square())
        return squares.sum() / max(self.logits.shape[0], 1)

    def sums(self) -> tuple[Tensor, Tensor]:
        entropies = torch.special.entr(self._parts()).sum(dim=1)
        largest = self.scores.amax(dim=1)
        return self._counting(entropies).sum(), self._counting(largest).sum()

    def _counting(self, values: Tensor) -> Tensor:
        """Return `values` [T], 0 for padding."""
        return values if self.padding is None else values.masked_fill(self.padding, 0.0)

    def _parts(self) -> Tensor:
        if self.routing.score_function == "softmax":
            return self.scores
        tiny = torch.finfo(self.scores.dtype).tiny
        return self.scores / self.scores.sum(dim=1, keepdim=True).clamp(min=tiny)


def choose(
    logits: Tensor,
    routing: RoutingConfig,
    expert_bias: Tensor | None,
    training: bool,
    quantile: Tensor | None = None,
    padding: Tensor | None = None,
) -> PlainChoice:
    """Return the choices for `logits` [T, E].

    `expert_bias` [E] is added to the scores, `quantile` [E] taken from the logits, for the choice
    alone. Tokens of `padding` [T] choose nothing: -1, with weights of 0.
    """
    softmax = routing.score_function == "softmax"
    scores = logits.softmax(dim=-1) if softmax else logits.sigmoid()
    with torch.no_grad():
        ranking = scores if expert_bias is None else scores + expert_bias
        if routing.num_groups is not None:
            ranking = _inside_best_groups(ranking, routing)
        elif quantile is not None:
            ranking = logits.float() - quantile
        elif expert_bias is None:
            ranking = logits  # the same order, and no ties where scores saturate
        if routing.noise == "rsample" and training:
            ranking = logits + _random.gumbel(tuple(logits.shape), logits)
        expert_ids = ranking.topk(routing.topk, dim=-1).indices  # [T, K]
        if routing.second_expert == "sampling":
            allowed = logits.masked_fill(ranking == NEVER, NEVER)
            expert_ids[:, 1] = _sample_second(allowed, expert_ids[:, 0])
    chosen = scores.gather(1, expert_ids)
    with torch.no_grad():
        expert_ids = _leave_out_second(expert_ids, chosen, routing)
    weights = weigh(chosen) if routing.normalize == "before_drop" else chosen
    if padding is not None:
        expert_ids = expert_ids.masked_fill(padding.unsqueeze(1), -1)
        weights = weights.masked_fill(padding.unsqueeze(1), 0.0)
    return PlainChoice(expert_ids, weights, chosen[:, 0], logits, scores, routing, padding)


def _inside_best_groups(scores: Tensor, routing: RoutingConfig) -> Tensor:
    """Return `scores` [T, E] with those outside the best `group_topk` groups at minus infinity.

    A group's score is the sum of its best experts: two in DeepSeek-V3 (arXiv:2412.19437, section
    2.1.2), one in DeepSeek-V2 (arXiv:2405.04434, section 2.2.2).
    """
    assert routing.num_groups is not None
    assert routing.group_topk is not None
    num_groups = routing.num_groups
    in_groups = scores.view(len(scores), num_groups, scores.shape[1] // num_groups)
    best = in_groups.topk(routing.each_of_group, dim=-1).values.sum(dim=-1)
    chosen = best.topk(routing.group_topk, dim=-1).indices  # [T, group_topk]
    outside = torch.ones_like(best, dtype=torch.bool).scatter(1, chosen, False)
    return in_groups.masked_fill(outside.unsqueeze(-1), NEVER).view_as(scores)


def _sample_second(logits: Tensor, first: Tensor) -> Tensor:
    """Return a draw [T] from the softmax of `logits` [T, E] without the `first` [T] expert."""
    noisy = logits + _random.gumbel(tuple(logits.shape), logits)
    return noisy.scatter(1, first.unsqueeze(1), NEVER).argmax(dim=-1)


def _leave_out_second(expert_ids: Tensor, chosen: Tensor, routing: RoutingConfig) -> Tensor:
    """Return `expert_ids` [T, K] with the second at -1 where the policy leaves it out.

    random: kept with probability g2 / threshold (GShard, arXiv:2006.16668, algorithm 1, where
    the threshold is 1/2); threshold: kept when g2 exceeds it. g2 is the second's part of both.
    """
    if routing.second_expert not in ("random", "threshold"):
        return expert_ids
    second = chosen[:, 1] / chosen.sum(dim=1).clamp(min=torch.finfo(chosen.dtype).tiny)
    if routing.second_expert == "random":
        draws = _random.uniform((len(second),), second)
        kept = draws * routing.second_threshold < second
    else:
        kept = second > routing.second_threshold
    left = expert_ids[:, 1].masked_fill(~kept, -1)
    return torch.stack([expert_ids[:, 0], left], dim=1)


def weigh(weights: Tensor) -> Tensor:
    """Return `weights` [T, K] divided by their sum."""
    total = weights.sum(dim=1, keepdim=True)
    return weights / total.clamp(min=torch.finfo(weights.dtype).tiny)
