"""The oracle: each token, each of its experts, in float64. No sorting, no communication."""

from math import pi

import torch
import torch.nn.functional as F
from torch import Tensor


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU's approximation by a hyperbolic tangent."""
    return x / 2 * (1 + torch.tanh((2 / pi) ** 0.5 * (x + 0.044715 * x**3)))


ACTIVATION = {"swiglu": F.silu, "geglu": F.gelu, "geglu_tanh": gelu_tanh}
ACTIVATION |= {"gelu": F.gelu, "relu": F.relu}


def expert(x: Tensor, weights: dict[str, Tensor], index: int, activation: str) -> Tensor:
    """Output [H] of one expert for one token [H]; fc1 [E, 2F or F, H], fc2 [E, H, F], biases."""
    h = weights["fc1"][index] @ x + weights["fc1_bias"][index]
    if activation in ("swiglu", "geglu", "geglu_tanh"):
        gate, up = h.chunk(2)
        h = ACTIVATION[activation](gate) * up
    else:
        h = ACTIVATION[activation](h)
    return weights["fc2"][index] @ h + weights["fc2_bias"][index]


def moe(hidden: Tensor, ids: Tensor, probs: Tensor, weights: dict[str, Tensor], act: str) -> Tensor:
    """Output [T, H] for `hidden` [T, H], expert `ids` [T, K] (-1 = dropped), `probs` [T, K]."""
    outputs = []
    for x, chosen, p in zip(hidden, ids.tolist(), probs, strict=True):
        terms = [p[k] * expert(x, weights, e, act) for k, e in enumerate(chosen) if e >= 0]
        outputs.append(sum(terms, x * 0))
    return torch.stack(outputs) if outputs else hidden * 0
