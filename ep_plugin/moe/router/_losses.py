"""Losses that keep the router balanced and its logits small."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ep_plugin.moe.groups import ExpertGroups, group_size
from ep_plugin.moe.routing_config import AuxLossScope, RoutingConfig

NAMES = {  # scope -> name, Megatron's where it has one
    "micro_batch": "load_balancing_loss",
    "group": "load_balancing_loss",
    "sequence": "seq_load_balancing_loss",
    "global": "global_load_balancing_loss",
}


class _AddLoss(torch.autograd.Function):
    """Identity on `carrier`; the backward also sends 1 to `loss`, as if the total held it."""

    @staticmethod
    def forward(ctx: Any, carrier: Tensor, loss: Tensor) -> Tensor:
        ctx.loss_like = (loss.dtype, loss.device)
        return carrier.view_as(carrier)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        dtype, device = ctx.loss_like
        return grads[0], torch.ones((), dtype=dtype, device=device)


def add_loss(carrier: Tensor, loss: Tensor) -> Tensor:
    """Return `carrier` unchanged, with the gradient of `loss` [] added in the backward.

    An auxiliary loss found deep in a pipeline stage needs no path to the last stage this way.
    """
    result: Tensor = _AddLoss.apply(carrier, loss)
    return result


@dataclass(frozen=True)
class Pools:
    """Which tokens a load-balancing loss is taken over; the layer's is the mean over pools."""

    num_pools: int
    index: Tensor | None  # [T] pool of each token; None: one pool
    group: dist.ProcessGroup | None  # whose ranks share the pools
    padding: Tensor | None = None  # [T] bool, tokens that are in no pool; None: all are in one

    def sum(self, values: Tensor) -> Tensor:
        """Return the sums [P, E] of `values` [T, E] over each pool, on this rank."""
        if self.padding is not None:
            values = values.masked_fill(self.padding.unsqueeze(1), 0.0)
        if self.index is None:
            return values.sum(dim=0, keepdim=True)
        sums = values.new_zeros(self.num_pools, values.shape[1])
        return sums.index_add(0, self.index, values)

    def count(self, expert_ids: Tensor, num_experts: int) -> Tensor:
        """Return [P, E + 1] int64: choices of each expert, then tokens, on this rank.

        `expert_ids` [T, K]; -1 is not counted.
        """
        width = num_experts + 1
        pool = expert_ids.new_zeros(len(expert_ids)) if self.index is None else self.index
        ids = torch.cat([expert_ids, torch.full_like(expert_ids[:, :1], num_experts)], dim=1)
        if self.padding is not None:
            ids = ids.masked_fill(self.padding.unsqueeze(1), -1)
        cell = pool.unsqueeze(1) * width + ids
        cell = torch.where(ids >= 0, cell, self.num_pools * width).flatten()
        counts = cell.new_zeros(self.num_pools * width + 1)
        counts = counts.scatter_add(0, cell, torch.ones_like(cell))
        return counts[:-1].view(self.num_pools, width)


def make_pools(
    tokens: Tensor,
    num_sequences: int,
    place: Tensor | None,
    scope: AuxLossScope,
    routing: RoutingConfig,
    groups: ExpertGroups,
    padding: Tensor | None = None,
) -> Pools:
    """Return the pools of a loss of this `scope` for `tokens` [T, ...].

    `place` [T] lists tokens sequence by sequence; routing groups need it. Tokens of `padding` [T]
    are in none.
    """
    num_tokens = len(tokens)
    if scope == "sequence":
        token = torch.arange(num_tokens, device=tokens.device)
        return Pools(num_sequences, token % num_sequences, groups.tp_cp, padding)
    if scope == "group":
        assert routing.group_tokens is not None
        assert place is not None
        num_pools = max(1, -(-num_tokens // routing.group_tokens))
        return Pools(num_pools, place // routing.group_tokens, None, padding)
    return Pools(1, None, groups.tp_cp, padding)


def load_balancing_loss(
    score_sums: Tensor, tokens: Tensor, counts: Tensor, pools: Pools, groups: ExpertGroups
) -> Tensor:
    """Return E * sum_e f_e * P_e [], 1 when balanced (Switch Transformer, arXiv:2101.03961, eq. 4).

    f_e is the fraction of choices, from `counts` [P, E] over all who share the pool; P_e is the
    mean score of expert e: `score_sums` [P, E] of this rank over the pool's `tokens` [P] on all
    ranks. So the result is this rank's part: its sum over `groups.tp_cp` is the loss, and
    gradients summed over that group are right. Pools of padding alone are left out of the mean.
    """
    counts = counts.to(score_sums.dtype)
    fractions = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)  # [P, E]
    mean_scores = score_sums / tokens.clamp(min=1).unsqueeze(1)  # [P, E]
    per_pool = score_sums.shape[1] * (fractions * mean_scores).sum(dim=1)  # [P]
    if pools.padding is None:
        loss = per_pool.mean()
    else:
        loss = per_pool.sum() / (tokens > 0).sum().clamp(min=1)
    alone = pools.group is None
    return loss / group_size(groups.tp_cp) if alone else loss


def counting_share(padding: Tensor, groups: ExpertGroups) -> Tensor:
    """Return [] fp64: what makes of a mean over this rank's tokens its part of one without padding.

    The mean of the parts over `groups.tp_cp`, whose ranks may have more `padding` [T] or less.
    """
    counted = (~padding).sum()
    if groups.tp_cp is not None:
        dist.all_reduce(counted, group=groups.tp_cp)
    return len(padding) * groups.tp_cp_size / counted.clamp(min=1).double()
