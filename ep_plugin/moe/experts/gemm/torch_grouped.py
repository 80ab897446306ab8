"""Grouped GEMM through torch's own grouped_mm: one kernel for all experts, no host sync.

On CUDA it takes bf16; on CPU fp32, bf16 and fp16. Rows of operands must start at multiples of 16
bytes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ep_plugin.errors import ConfigError
from ep_plugin.moe.experts.gemm._sizes import check_multiples
from ep_plugin.moe.interfaces import GroupedGemm

ALIGNMENT = 16  # bytes


class TorchGroupedGemm:
    """torch.nn.functional.grouped_mm in all three directions."""

    waits_for_host = False

    def forward(self, rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        return F.grouped_mm(rows, weight.transpose(1, 2), offs=ends)

    def dgrad(self, grads: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        return F.grouped_mm(grads.contiguous(), weight, offs=ends)

    def wgrad(self, grads: Tensor, rows: Tensor, ends: Tensor) -> Tensor:
        return F.grouped_mm(grads.contiguous().T, rows, offs=ends)


def build(in_features: int, out_features: int, dtype: torch.dtype) -> GroupedGemm:
    """Return the backend; raises ConfigError for sizes or a dtype grouped_mm has no kernel for."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ConfigError(
            f"<gemm=torch_grouped> needs fp32, bf16 or fp16; got {dtype}; use <gemm=loop>"
        )
    unit = ALIGNMENT // dtype.itemsize
    check_multiples("torch_grouped", in_features, out_features, unit, f" in {dtype}")
    return TorchGroupedGemm()
