"""Grouped GEMM by our own kernels for Hopper: bf16, sizes that are multiples of 8, no host sync.

Weight gradients that are made anew are by torch's grouped_mm, which is as fast. Those that are
added to fp32 totals are no backend's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ep_plugin.errors import ConfigError
from ep_plugin.moe.experts.gemm._sizes import check_multiples
from ep_plugin.moe.experts.hopper import ALIGNED, on_hopper
from ep_plugin.moe.interfaces import GroupedGemm
from ep_plugin.moe.kernels.bf16_product import multiply_grads, multiply_rows


class TritonGemm:
    """`kernels.bf16_product` in forward and dgrad."""

    waits_for_host = False

    def forward(self, rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        return multiply_rows(rows, weight, ends)

    def dgrad(self, grads: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        return multiply_grads(grads, weight, ends)

    def wgrad(self, grads: Tensor, rows: Tensor, ends: Tensor) -> Tensor:
        return F.grouped_mm(grads.contiguous().T, rows, offs=ends)


def build(in_features: int, out_features: int, dtype: torch.dtype) -> GroupedGemm:
    """Return the backend; raises ConfigError for a dtype, size or GPU it has no kernel for."""
    if dtype != torch.bfloat16:
        raise ConfigError(f"<gemm=triton> needs bf16; got {dtype}; use <gemm=loop>")
    check_multiples("triton", in_features, out_features, ALIGNED)
    if not on_hopper():
        raise ConfigError("<gemm=triton> needs a Hopper GPU; use <gemm=torch_grouped>")
    return TritonGemm()
