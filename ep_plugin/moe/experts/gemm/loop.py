"""Grouped GEMM as one torch.mm per expert: the reference, for any device and dtype.

Host syncs: one per call, to read the row counts.
"""

import torch
from torch import Tensor

from ep_plugin.moe.interfaces import GroupedGemm


class LoopGemm:
    """One torch.mm per expert."""

    waits_for_host = True

    def forward(self, rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        return self._by_rows(rows, weight.transpose(1, 2), ends)

    def dgrad(self, grads: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        return self._by_rows(grads, weight, ends)

    def wgrad(self, grads: Tensor, rows: Tensor, ends: Tensor) -> Tensor:
        blocks = zip(
            *(torch.tensor_split(matrix, ends.long().cpu()) for matrix in (grads, rows)),
            strict=True,
        )
        return torch.stack([g.T @ r for g, r in list(blocks)[:-1]])

    def _by_rows(self, rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
        """Multiply each expert's block of `rows` [R, a] by its matrix [e, a, b]: [R, b]."""
        blocks = torch.tensor_split(rows, ends.long().cpu())
        products = [block @ matrix for block, matrix in zip(blocks[:-1], matrices, strict=True)]
        rest = rows.new_empty(len(blocks[-1]), matrices.shape[2])
        return torch.cat([*products, rest])


def build(in_features: int, out_features: int, dtype: torch.dtype) -> GroupedGemm:
    """Return the backend; it takes every size and dtype."""
    return LoopGemm()
