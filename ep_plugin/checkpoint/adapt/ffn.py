"""From one dense FFN to experts, shared expert and router: pure tensor maths.

A feed-forward block's tensors, as Megatron keeps them, and the channels they have in common:

    linear_fc1.weight [F, H], gated [2F, H] = [gate; value]      linear_fc1.bias [F] or [2F]
    linear_fc2.weight [H, F]                                     linear_fc2.bias [H]

A channel is one of the F hidden units: a row of fc1 (of each half), a column of fc2.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ep_plugin.checkpoint.adapt.upcycling import Gain, RouterInit
from ep_plugin.checkpoint.tensors import Region


@dataclass(frozen=True)
class FfnTensor:
    """One tensor of one layer's FFN."""

    layer: int
    fc: int  # 1 or 2
    is_weight: bool  # else bias
    gated: bool
    half: str = ""  # "_w": fc1's gate alone, "_v": its value alone, where they are saved apart

    @property
    def channel_dim(self) -> int | None:
        """The dim of the channels; None for the bias of fc2, which has none."""
        if self.fc == 1:
            return 0
        return 1 if self.is_weight else None

    def halves(self, values: Tensor) -> tuple[Tensor, ...]:
        """Return views of `values`, each with F channels."""
        return values.chunk(2) if self.fc == 1 and self.gated and not self.half else (values,)


Change = Callable[
    [Tensor, FfnTensor, int], Tensor
]  # (weights of one expert, which, expert) -> new ones


@dataclass(frozen=True)
class Mode:
    """`granularity` experts share one dense FFN; `change` is what happens to their weights.

    `deviation`: why the experts do not add up to the dense FFN; None when they do.
    """

    granularity: int = 1
    change: Change | None = None
    deviation: str | None = None


def shard(values: Tensor, part: FfnTensor, index: int, granularity: int) -> Tensor:
    """Return the channels of shard `index` out of `granularity`; all of a bias of fc2."""
    if granularity == 1 or part.channel_dim is None:
        return values
    pieces = [h.chunk(granularity, part.channel_dim)[index] for h in part.halves(values)]
    return torch.cat(pieces).contiguous() if len(pieces) > 1 else pieces[0].contiguous()


def generator(*key: object) -> torch.Generator:
    """Return a generator seeded by `key`, the same in every process and order of work."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def normal(like: Tensor, *key: object) -> Tensor:
    """Return fp32 (fp64 for fp64) draws from N(0, 1) of the shape of `like`."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return torch.randn(like.shape, generator=generator(*key), dtype=dtype)


@dataclass(frozen=True)
class ExpertMaker:
    """The experts of an upcycled layer.

    A shared expert that is added would double the output, so it and the routed experts each get
    half of it. One that is weighed by the learned softmax (a residual expert, arXiv:2201.05596) is
    whole: the two weights sum to 1 and both sides compute the dense FFN.
    """

    mode: Mode
    num_experts: int
    gated: bool
    routed: Gain
    shared: Gain
    deviations: tuple[str, ...] = ()  # why they do not compute what the dense FFN did

    def experts(
        self, dense: Tensor, part: FfnTensor, moments: bool, only: int | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield each expert, or `only` one, with its tensor made of `dense`.

        moments: it is optimizer state of that tensor, which is cut but neither changed nor scaled
        (Adam's steps do not depend on the scale of its moments).
        """
        parts = self.mode.granularity
        for expert in range(self.num_experts) if only is None else (only,):
            values = shard(dense, part, expert % parts, parts)
            if moments:
                yield expert, values
                continue
            if self.mode.change is not None:
                values = self.mode.change(values, part, expert)
            yield expert, scaled(values, part, self.routed)

    def regions(
        self,
        read: Callable[[], Tensor],
        part: FfnTensor,
        moments: bool,
        only: int | None = None,
    ) -> Iterator[Region]:
        """Yield all experts along a leading axis, or one of them alone; the dense is read once."""
        for expert, values in self.experts(read(), part, moments, only):
            zeros = (0,) * values.dim()
            if only is None:
                yield Region((expert, *zeros), values.unsqueeze(0))
            else:
                yield Region(zeros, values)

    def shared_expert(self, dense: Tensor, part: FfnTensor, moments: bool) -> Tensor:
        """Return the shared expert's tensor: all channels of the dense one."""
        return dense if moments else scaled(dense, part, self.shared)


def scaled(values: Tensor, part: FfnTensor, gain: Gain) -> Tensor:
    """Return `values` times its factor; itself where that is 1."""
    if part.fc == 2:
        factor = gain.weight if part.is_weight else gain.bias
        return values if factor == 1 else values * factor
    if gain.value == 1 or not part.gated or part.half == "_w":
        return values
    values = values.clone()
    part.halves(values)[-1].mul_(gain.value)
    return values


def router_rows(
    init: RouterInit, shape: tuple[int, int], granularity: int, std: float, seed: int, layer: int
) -> Tensor:
    """Return the weight [E, H] of one layer's new router, fp32.

    normal: rows from N(0, std^2), the checkpoint's init_method_std. The router is the only thing in
    which copied experts differ at the start; random rows spread the tokens, and from then on each
    expert sees other tokens and the copies drift apart.

    virtual-group (arXiv:2410.07524): one such row for each group of `granularity` experts, repeated
    inside the group, so that the shards of one FFN are chosen together. With granularity 1 it is
    normal.

    zero: every expert has the same logit and the same weight, so gates that are not divided by
    their sum have a known sum. But top-k then breaks the tie by index: the same k experts see
    every token until the router has moved.
    """
    if init == "zero":
        return torch.zeros(shape)
    repeats = granularity if init == "virtual-group" else 1
    rows = torch.randn(shape[0] // repeats, shape[1], generator=generator(seed, layer, "router"))
    return (rows * std).repeat_interleave(repeats, dim=0)
