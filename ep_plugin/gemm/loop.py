"""Grouped GEMM as one plain matrix product per expert: any device, any dtype, the reference.

Host syncs: one per call, to read the row counts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ep_plugin.contracts import GroupedGemm


def loop_gemm(rows: Tensor, weight: Tensor, tokens_per_expert: Tensor) -> Tensor:
    """Multiply each expert's block of `rows` [R, a] by its `weight` [e, b, a]: [R, b]."""
    blocks = torch.split(rows, tokens_per_expert.tolist())
    # Experts without rows stay in the graph: their gradient is zero, not missing.
    products = [F.linear(block, matrix) for block, matrix in zip(blocks, weight, strict=True)]
    return torch.cat(products)


def build(in_features: int, out_features: int, dtype: torch.dtype) -> GroupedGemm:
    """Return the backend; every size and dtype will do."""
    return loop_gemm
