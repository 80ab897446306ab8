"""Drop-Upcycling (arXiv:2502.19261): each expert forgets a part of the dense FFN of its own.

For each expert a set S of floor(ratio * F) channels is drawn. In fc1 (each half) and fc2 the
weights of these channels are drawn anew from N(mean, std^2), the mean and the standard deviation of
the dense weights that they replace; so are the biases of fc1. The other channels stay. Experts
differ from the start, and the function is kept only as far as the channels that stay make it.
"""

from functools import partial

import torch
from torch import Tensor

from ep_plugin.checkpoint.adapt.ffn import FfnTensor, Mode, generator, normal
from ep_plugin.checkpoint.adapt.upcycling import Upcycling


def build(settings: Upcycling) -> Mode:
    """Return the mode with the ratio and the seed of `settings`."""
    ratio = settings.drop_ratio
    deviation = f"--mode drop draws {ratio:.0%} of each expert's channels anew" if ratio else None
    return Mode(change=partial(_redraw, ratio, settings.seed), deviation=deviation)


def dropped(num_channels: int, ratio: float, seed: int, layer: int, expert: int) -> Tensor:
    """Return the channels S of one expert, int64."""
    drawn = torch.randperm(num_channels, generator=generator(seed, layer, expert, "channels"))
    return drawn[: int(ratio * num_channels)]


def _redraw(ratio: float, seed: int, values: Tensor, part: FfnTensor, expert: int) -> Tensor:
    dim = part.channel_dim
    if dim is None:
        return values
    new = values.clone()
    for number, half in enumerate(part.halves(new)):
        chosen = dropped(half.shape[dim], ratio, seed, part.layer, expert)
        if not len(chosen):
            continue
        old = half.index_select(dim, chosen)
        wide = old.to(torch.promote_types(old.dtype, torch.float32))
        key = (seed, part.layer, expert, part.fc, part.is_weight, part.half or ("_w", "_v")[number])
        drawn = normal(wide, *key) * wide.std(correction=0) + wide.mean()
        half.index_copy_(dim, chosen, drawn.to(old.dtype))
    return new
