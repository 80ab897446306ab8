"""How a new router begins.

normal: rows from N(0, std^2), the checkpoint's init_method_std. The router is the only thing in
which copied experts differ at the start; random rows spread the tokens, and from then on each
expert sees other tokens and the copies drift apart.

virtual-group (arXiv:2410.07524): one such row for each group of `granularity` experts, repeated
inside the group, so that the shards of one FFN are chosen together. With granularity 1 it is
normal.

zero: every expert has the same logit and the same weight, so gates that are not divided by their
sum have a known sum. But top-k then breaks the tie by index: the same k experts see every token
until the router has moved.
"""

import torch
from torch import Tensor

from ep_plugin.checkpoint.adapt.ffn import generator
from ep_plugin.checkpoint.adapt.upcycling import RouterInit


def router_rows(
    init: RouterInit, shape: tuple[int, int], granularity: int, std: float, seed: int, layer: int
) -> Tensor:
    """Return the weight [E, H] of one layer's router, fp32."""
    if init == "zero":
        return torch.zeros(shape)
    repeats = granularity if init == "virtual-group" else 1
    rows = torch.randn(shape[0] // repeats, shape[1], generator=generator(seed, layer, "router"))
    return (rows * std).repeat_interleave(repeats, dim=0)
