"""Copies with Gaussian noise: experts differ a little from the start.

Every weight matrix W of an expert becomes W + ratio * std(W) * N(0, 1), std taken over the dense
matrix (over each half of a gated fc1). Biases stay. The output moves by about `ratio` of its size
in each product.
"""

from functools import partial

import torch
from torch import Tensor

from ep_plugin.checkpoint.adapt.ffn import FfnTensor, Mode, normal
from ep_plugin.checkpoint.adapt.upcycling import Upcycling


def build(settings: Upcycling) -> Mode:
    """Return the mode with the relative standard deviation and the seed of `settings`."""
    ratio = settings.noise_std
    deviation = f"--mode noise adds {ratio:g} std to every weight of the experts" if ratio else None
    return Mode(change=partial(_perturb, ratio, settings.seed), deviation=deviation)


def _perturb(ratio: float, seed: int, values: Tensor, part: FfnTensor, expert: int) -> Tensor:
    if not part.is_weight:
        return values
    new = values.clone()
    for number, half in enumerate(part.halves(new)):
        wide = half.to(torch.promote_types(half.dtype, torch.float32))
        key = (seed, part.layer, expert, part.fc, part.half or ("_w", "_v")[number])
        half.copy_(wide + normal(wide, *key) * (ratio * wide.std(correction=0)))
    return new
