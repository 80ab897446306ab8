"""Expert parameters in a distributed checkpoint, under the keys Megatron's own experts have.

Our experts are one stacked tensor per map; Megatron saves one tensor per expert, either with a
leading expert axis or, with `singleton_local_shards`, under one key per expert. A gated fc1 is
saved as two halves. So each stacked tensor is a ShardedTensorFactory: split on save, stacked on
load; optimizer states follow.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.transformer.utils import make_sharded_object_for_checkpoint
from torch import Tensor

from ep_plugin.moe.experts.experts import Experts
from ep_plugin.moe.groups import ExpertGroups, group_rank, group_size

EXTRA_STATE = "_extra_state"
Offset = tuple[int, int, int]  # (axis, index along it, number of pieces)


@dataclass(frozen=True)
class _Layout:
    """How one stacked parameter [e, ...] is cut into Megatron's tensors."""

    shard_dim: int | None  # dimension of one expert's tensor that etp splits
    halves: int  # 2 for a gated fc1
    singleton: bool
    layer_offsets: tuple[Offset, ...]
    groups: ExpertGroups
    num_experts: int

    def pieces(self, key: str, stacked: Tensor) -> Iterator[tuple[str, Tensor, list[Offset]]]:
        """Yield (key, tensor, offsets) for every piece, experts first, halves second."""
        first = self.groups.ep_rank * len(stacked)
        for expert, matrix in enumerate(stacked.unbind(0), start=first):
            for half, piece in enumerate(matrix.chunk(self.halves, dim=0)):
                yield self._key(key, expert, half), piece, self._offsets(expert, half)

    def _key(self, key: str, expert: int, half: int) -> str:
        if not self.singleton:
            return key
        head, _, tail = key.rpartition("experts.")
        suffix = ("_w", "_v")[half] if self.halves == 2 else ""
        return f"{head}experts.{expert}.{tail}{suffix}"

    def _offsets(self, expert: int, half: int) -> list[Offset]:
        offsets = list(self.layer_offsets)
        if not self.singleton:
            offsets.append((len(offsets), expert, self.num_experts))
        if self.shard_dim is not None:
            etp, rank = self.groups.etp_size, self.groups.etp_rank
            axis = len(offsets) + self.shard_dim
            if self.singleton:
                offsets.append((axis, rank, etp))
            else:
                offsets.append((axis, rank + half * etp, etp * self.halves))
        return offsets


def expert_sharded_state(
    experts: Experts,
    groups: ExpertGroups,
    num_experts: int,
    prefix: str,
    sharded_offsets: tuple[Offset, ...],
    metadata: dict[str, Any],
) -> dict[str, ShardedTensorFactory | ShardedObject]:
    """Return a factory for each expert parameter, keyed by its name under `prefix`.

    With them go the empty `_extra_state` objects that Megatron's own linear layers insist on
    finding.
    """
    singleton = bool(metadata.get("singleton_local_shards", False))
    state: dict[str, ShardedTensorFactory | ShardedObject] = {}
    for name, parameter in experts.named_parameters():
        is_fc1, is_weight = "linear_fc1" in name, name.endswith("weight")
        layout = _Layout(
            shard_dim=0 if is_fc1 else (1 if is_weight else None),
            halves=2 if is_fc1 and experts.gated else 1,
            singleton=singleton,
            layer_offsets=tuple(sharded_offsets),
            groups=groups,
            num_experts=num_experts,
        )
        # (PP, TP, DP) copy of the piece: only a whole fc2 bias is repeated over etp.
        etp_copy = groups.etp_rank if layout.shard_dim is None else 0
        if is_weight:
            state |= _extra_states(layout, prefix, name.removesuffix("weight") + EXTRA_STATE)
        state[f"{prefix}{name}"] = ShardedTensorFactory(
            key=f"{prefix}experts.{name}",
            data=parameter,
            build_fn=_Build(layout),
            merge_fn=_Merge(layout.halves),
            replica_id=(0, etp_copy, _holder(groups)),
        )
    return state


def _holder(groups: ExpertGroups) -> int:
    """Return this rank's place among those that hold the same experts; the first one saves them."""
    return group_rank(groups.edp) * group_size(groups.copies) + group_rank(groups.copies)


def _extra_states(layout: _Layout, prefix: str, name: str) -> dict[str, ShardedObject]:
    """Return one empty object for each local expert of a linear map."""
    groups, state = layout.groups, {}
    num_local = layout.num_experts // groups.ep_size
    for expert in range(groups.ep_rank * num_local, (groups.ep_rank + 1) * num_local):
        offsets = list(layout.layer_offsets)
        if not layout.singleton:
            offsets.append((len(offsets), expert, layout.num_experts))
        key = f"{prefix}experts.{expert}.{name}" if layout.singleton else f"{prefix}experts.{name}"
        state[f"{prefix}{name}.{expert}"] = make_sharded_object_for_checkpoint(
            None, key, offsets, replica_id=(0, groups.etp_rank, _holder(groups))
        )
    return state


@dataclass(frozen=True)
class _Build:
    layout: _Layout

    def __call__(
        self, key: str, stacked: Tensor, replica_id: Any, flattened_range: None
    ) -> list[ShardedTensor]:
        prepended = len(self.layout.layer_offsets) + (0 if self.layout.singleton else 1)
        return [
            ShardedTensor.from_rank_offsets(
                piece_key, piece, *offsets, replica_id=replica_id, prepend_axis_num=prepended
            )
            for piece_key, piece, offsets in self.layout.pieces(key, stacked)
        ]


@dataclass(frozen=True)
class _Merge:
    halves: int

    def __call__(self, pieces: list[Tensor]) -> Tensor:
        pairs = [pieces[i : i + self.halves] for i in range(0, len(pieces), self.halves)]
        return torch.stack([torch.cat(pair) for pair in pairs])
