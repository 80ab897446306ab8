"""One feed-forward block's tensors, as Megatron keeps them, and the channels they have in common.

    linear_fc1.weight [F, H], gated [2F, H] = [gate; value]      linear_fc1.bias [F] or [2F]
    linear_fc2.weight [H, F]                                     linear_fc2.bias [H]

A channel is one of the F hidden units: a row of fc1 (of each half), a column of fc2.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


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
