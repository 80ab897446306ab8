"""Choices by the fused kernel; imported where there is a CUDA tensor alone."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ep_plugin.moe.kernels import route as kernel
from ep_plugin.moe.kernels.capacity import Capacity
from ep_plugin.moe.router import _random
from ep_plugin.moe.router._capacity import limits
from ep_plugin.moe.router._losses import Pools
from ep_plugin.moe.routing_config import RoutingConfig

fits = kernel.fits


@dataclass(frozen=True)
class FusedChoice:
    """What `kernels.route` found; a `Choice` whose sums are over all tokens of the rank."""

    routed: kernel.Routed

    @property
    def expert_ids(self) -> Tensor:
        return self.routed.expert_ids

    @property
    def weights(self) -> Tensor:
        return self.routed.weights

    @property
    def first_scores(self) -> Tensor:
        return self.routed.weights[:, 0]

    @property
    def sent_ids(self) -> Tensor:
        return self.routed.sent_ids

    @property
    def sent(self) -> Tensor:
        return self.routed.sent

    def score_sums(self, pools: Pools) -> Tensor:
        assert pools.index is None
        return self.routed.score_sums

    def counts(self, pools: Pools) -> Tensor:
        assert pools.index is None
        tokens = torch.full_like(self.routed.counted[:1], len(self.routed.expert_ids))
        return torch.cat([self.routed.counted, tokens]).unsqueeze(0)

    @property
    def own_loss(self) -> Tensor:
        return self.routed.balancing_loss

    def z_loss(self) -> Tensor:
        return self.routed.z_loss

    def sums(self) -> tuple[Tensor, Tensor]:
        return self.routed.entropy, self.routed.confidence


def choose(
    logits: Tensor,
    routing: RoutingConfig,
    expert_bias: Tensor | None,
    factor: float | None,
    num_sequences: int,
) -> FusedChoice:
    """Return the choices for `logits` [T, E], those without room at capacity `factor` marked.

    `expert_bias` [E] moves the choice alone; None for `factor` drops nothing.
    """
    room = None if factor is None else _capacity(logits, routing, factor, num_sequences)
    return FusedChoice(kernel.route(logits, routing, expert_bias, room))


def _capacity(
    logits: Tensor, routing: RoutingConfig, factor: float, num_sequences: int
) -> Capacity:
    num_tokens, num_experts = logits.shape
    draws = None
    if routing.drop_policy == "random":
        draws = _random.uniform((num_tokens, routing.topk), logits)
    group_tokens, limit, last = limits(num_tokens, num_experts, factor, routing)
    return Capacity(group_tokens, limit, last, num_sequences, routing.drop_policy, draws)
