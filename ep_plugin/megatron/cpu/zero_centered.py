"""Norms whose weight is kept as its distance from 1: Megatron's `--apply-layernorm-1p`.

Transformer Engine has them; Megatron's local implementation refuses them. These are torch's, which
the local implementation uses, with 1 + weight in place of the weight, in fp32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * (1 + weight), weight [H] of zeros at first."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return the norm of `x` [..., H], in its dtype: rounded once, after the weight."""
        assert self.eps is not None
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return (wide * scale * (1 + self.weight.float())).type_as(x)


class LayerNorm(nn.LayerNorm):
    """(x - mean(x)) / std(x) * (1 + weight) + bias, both [H] of zeros at first."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the norm of `x` [..., H], in its dtype: rounded once, after weight and bias."""
        weight, bias = 1 + self.weight.float(), self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).type_as(x)


def zero_centered(norm: nn.RMSNorm | nn.LayerNorm) -> RMSNorm | LayerNorm:
    """Return a norm of ours that is as wide as one of torch's, and computes the same."""
    assert norm.eps is not None
    kind = RMSNorm if isinstance(norm, nn.RMSNorm) else LayerNorm
    return kind(norm.normalized_shape, eps=norm.eps)
