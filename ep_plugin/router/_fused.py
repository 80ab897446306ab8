"""Choices by the fused kernel; imported where there is a CUDA tensor alone."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ep_plugin.config import RoutingConfig
from ep_plugin.kernels import routing as kernel
from ep_plugin.router._losses import Pools


def fits(logits: Tensor, routing: RoutingConfig, training: bool) -> bool:
    """Whether the kernel does this routing; `PlainChoice` does all."""
    # bpr ranks by the scores before their division, which the kernel does not return.
    return kernel.fits(logits, routing, training) and routing.drop_policy != "bpr"


@dataclass(frozen=True)
class FusedChoice:
    """What `kernels.routing` found; a `Choice` whose sums are over all tokens of the rank."""

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


def choose(logits: Tensor, routing: RoutingConfig, expert_bias: Tensor | None) -> FusedChoice:
    """Return the choices for `logits` [T, E]; `expert_bias` [E] moves the choice alone."""
    return FusedChoice(kernel.route(logits, routing, expert_bias))
