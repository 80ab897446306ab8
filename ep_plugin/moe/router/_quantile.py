"""Quantile balancing: experts are chosen by logit minus a bias at which all are loaded alike.

One step of coordinate descent on the dual of the balanced assignment, as in megatron-core 0.19.
The threshold of a token is its best logit, less the bias, that was not chosen. Of an expert's
logits less these thresholds, the bias is the quantile that leaves it its fair share of tokens.
"""

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from ep_plugin.moe.router.topk import TopKRouter


@torch.no_grad()
def collect(router: "TopKRouter", logits: Tensor) -> None:
    """Add the quantile of this micro-batch's `logits` [T, E], of all ranks of `groups.tp_cp`."""
    assert router.qb_beta is not None
    assert router.qb_beta_accum is not None
    assert router.qb_beta_count is not None
    whole, group = logits.detach().float().contiguous(), router.groups.tp_cp
    if group is not None:
        tokens, experts = whole.shape
        shape = (tokens * dist.get_world_size(group), experts)
        gathered = whole.new_empty(shape)
        dist.all_gather_into_tensor(gathered, whole, group=group)
        whole = gathered
    tokens, experts = whole.shape
    if tokens == 0:
        return
    topk = router.routing.topk
    thresholds = (whole - router.qb_beta).topk(topk + 1, dim=1).values[:, -1:]  # [T, 1]
    share = tokens * topk // experts
    router.qb_beta_accum += (whole - thresholds).topk(share + 1, dim=0).values[-1]  # [E]
    router.qb_beta_count += 1


@torch.no_grad()
def update(router: "TopKRouter") -> None:
    """Blend the mean quantile of the step with the bias so far, about a mean of 0; start anew."""
    assert router.qb_beta is not None
    assert router.qb_beta_accum is not None
    assert router.qb_beta_count is not None
    mean, group = router.qb_beta_accum / router.qb_beta_count.clamp(min=1), router.groups.tp_dp_cp
    if group is not None:
        dist.all_reduce(mean, group=group)
        mean /= dist.get_world_size(group)
    ema = router.routing.quantile_ema
    moved = ema * router.qb_beta + (1 - ema) * mean
    router.qb_beta.copy_(moved - moved.mean())
    router.qb_beta_accum.zero_()
    router.qb_beta_count.zero_()
