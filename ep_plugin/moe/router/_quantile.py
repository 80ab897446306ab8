"""Quantile balancing: experts are chosen by logit minus a bias at which all are loaded alike.

One step of coordinate descent on the dual of the balanced assignment, as in megatron-core 0.19.
The threshold of a token is its best logit, less the bias, that was not chosen. Of an expert's
logits less these thresholds, the bias is the quantile that leaves it its fair share of tokens.
"""

import torch
import torch.distributed as dist
from torch import Tensor


@torch.no_grad()
def quantile(
    logits: Tensor, bias: Tensor, topk: int, group: dist.ProcessGroup | None
) -> Tensor | None:
    """Return the quantile [E] fp32 of a micro-batch's `logits` [T, E], of all ranks of `group`.

    `bias` [E] is that of the step before. None where there is no token.
    """
    whole = logits.detach().float().contiguous()
    if group is not None:
        tokens, experts = whole.shape
        gathered = whole.new_empty(tokens * dist.get_world_size(group), experts)
        dist.all_gather_into_tensor(gathered, whole, group=group)
        whole = gathered
    tokens, experts = whole.shape
    if tokens == 0:
        return None
    thresholds = (whole - bias).topk(topk + 1, dim=1).values[:, -1:]  # [T, 1]
    share = tokens * topk // experts
    return (whole - thresholds).topk(share + 1, dim=0).values[-1]


@torch.no_grad()
def moved(bias: Tensor, mean: Tensor, ema: float, group: dist.ProcessGroup | None) -> Tensor:
    """Return `ema` of the `bias` [E] so far and the rest of a step's mean quantile, about 0.

    `mean` [E] is this rank's; that of all ranks of `group` counts.
    """
    if group is not None:
        dist.all_reduce(mean, group=group)
        mean /= dist.get_world_size(group)
    blended = ema * bias + (1 - ema) * mean
    return blended - blended.mean()
