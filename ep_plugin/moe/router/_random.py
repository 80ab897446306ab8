"""Every random number of the routers, from torch's default generator of the tensor's device.

`torch.manual_seed` makes them repeatable, and activation recomputation, which restores that
generator, draws the same ones again.
"""

from typing import Any

import torch
from torch import Tensor


def uniform(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Return draws from [0, 1) with the dtype and device of `like`."""
    return torch.rand(shape, dtype=like.dtype, device=like.device)


def gumbel(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Return draws from Gumbel(0, 1): the largest of logits + draws is a sample of their softmax.

    arXiv:1611.01144, section 2.
    """
    # 1 - u lies in (0, 1]; the negative logarithm of an exponential draw is a Gumbel draw.
    exponential = -torch.log1p(-uniform(shape, like))
    tiny = torch.finfo(like.dtype).tiny  # u = 0 would give infinity
    return -torch.log(exponential.clamp(min=tiny))


class _RandomLogits(torch.autograd.Function):
    """Draws in place of the logits; the backward is the identity."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        return torch.randn_like(logits)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def random_logits(logits: Tensor) -> Tensor:
    """Return draws from N(0, 1), shaped as `logits` [T, E], that pass their gradient on to it."""
    drawn: Tensor = _RandomLogits.apply(logits)
    return drawn
