"""Losses that keep the router balanced and its logits small."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


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


def load_balancing_loss(
    logits: Tensor, tokens_per_expert: Tensor, group: dist.ProcessGroup | None
) -> Tensor:
    """Return E * sum_e f_e * P_e [], 1 when balanced (Switch Transformer, arXiv:2101.03961, eq. 4).

    f_e is the fraction of choices and P_e the mean probability of expert e over the tokens of all
    ranks of `group`, from `logits` [T, E] and `tokens_per_expert` [E] of each. P_e is this rank's
    part of the mean: the sum of the result over the group is the loss, and gradients summed over
    it are right.
    """
    num_experts = logits.shape[1]
    counts = torch.cat([tokens_per_expert, tokens_per_expert.new_tensor([logits.shape[0]])])
    if group is not None:
        dist.all_reduce(counts, group=group)
    total_tokens = counts[-1].clamp(min=1)  # []
    fractions = counts[:-1] / counts[:-1].sum().clamp(min=1)  # [E]
    mean_probs = logits.softmax(dim=-1).sum(dim=0) / total_tokens  # [E]
    return num_experts * (fractions * mean_probs).sum()


def z_loss(logits: Tensor) -> Tensor:
    """Return the mean over tokens of logsumexp(logits)^2 [] (ST-MoE, arXiv:2202.08906, eq. 5)."""
    return logits.logsumexp(dim=-1).square().sum() / max(logits.shape[0], 1)
