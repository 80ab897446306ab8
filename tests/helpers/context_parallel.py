"""Attention over a sequence that context-parallel ranks share: Megatron's local one has none.

Keys and values are gathered, which is exact and slow; the MoE layers, the losses and the optimizer
around it see context parallelism as they do under Transformer Engine.
"""

import copy
from typing import Any

import torch
from core_model import places
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region as gather
from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch import Tensor


class GatheredAttention(DotProductAttention):  # type: ignore[misc]
    """Megatron's local attention of this rank's queries to every rank's keys and values."""

    def __init__(self, config: Any, *rest: Any, **settings: Any) -> None:
        config = copy.copy(config)
        config.context_parallel_size = 1  # more is refused
        super().__init__(config, *rest, **settings)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *rest: Any, **settings: Any
    ) -> Tensor:
        """Return [S / CP, B, H] for query, key and value [S / CP, B, heads, H / heads]."""
        group = parallel_state.get_context_parallel_group()
        rank, size = group.rank(), group.size()
        keys, values = (gather(part, group=group) for part in (key, value))
        theirs = torch.cat([places(other, size) for other in range(size)])
        later = places(rank, size)[:, None] < theirs
        attended: Tensor = super().forward(
            query, keys, values, later[None, None], *rest, **settings
        )
        return attended
