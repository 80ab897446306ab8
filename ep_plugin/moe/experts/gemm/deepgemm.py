"""Grouped GEMM through DeepGEMM's bf16 kernels, compiled for a shape at its first use (Hopper).

Its kernels need every expert's block to begin at a multiple of 128 rows. So rows are copied to
padded places, and products are copied back. Host syncs: none in forward and dgrad; one in wgrad,
whose kernel takes the row counts as host integers.
"""

from itertools import pairwise

import torch
from torch import Tensor

from ep_plugin.errors import ConfigError
from ep_plugin.moe.experts.gemm._blocks import BLOCK, place_rows, spread
from ep_plugin.moe.experts.gemm._sizes import check_multiples
from ep_plugin.moe.experts.hopper import on_hopper
from ep_plugin.moe.interfaces import GroupedGemm

try:
    import deep_gemm
except AssertionError as error:  # raised without a text if it finds no compiler
    raise ImportError("deep_gemm finds no CUDA toolkit to compile with; set CUDA_HOME") from error

if type(deep_gemm._C).__module__.partition(".")[0] == "tvm_ffi":
    raise ImportError(
        "deep_gemm here is sgl-deep-gemm, which refuses these bf16 products; use DeepGEMM"
    )

ALIGNMENT = 64  # features; the kernels' step along the summed dimension


class DeepGemm:
    """m_grouped_bf16_gemm_nt_contiguous and k_grouped_bf16_gemm_tn_contiguous on padded rows."""

    waits_for_host = True

    def forward(self, rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        return _by_rows(rows, weight, ends)

    def dgrad(self, grads: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        return _by_rows(grads, weight.transpose(1, 2), ends)

    def wgrad(self, grads: Tensor, rows: Tensor, ends: Tensor) -> Tensor:
        places = place_rows(ends, len(rows))
        padded = [
            -(-(end - start) // BLOCK) * BLOCK for start, end in pairwise([0, *ends.tolist()])
        ]
        # Padding is zeros, which add nothing to the sum over rows.
        a, b = (spread(matrix, places, 0)[: sum(padded)] for matrix in (grads, rows))
        weight = rows.new_zeros(len(ends), grads.shape[1], rows.shape[1])
        deep_gemm.k_grouped_bf16_gemm_tn_contiguous(
            a, b, weight, padded, ends.new_tensor(padded), c=weight
        )
        return weight


def build(in_features: int, out_features: int, dtype: torch.dtype) -> GroupedGemm:
    """Return the backend; raises ConfigError for a dtype, size or GPU DeepGEMM does not take."""
    if dtype != torch.bfloat16:
        raise ConfigError(f"<gemm=deepgemm> needs bf16; got {dtype}; use <gemm=loop>")
    check_multiples("deepgemm", in_features, out_features, ALIGNMENT)
    if not on_hopper():
        raise ConfigError("<gemm=deepgemm> needs a Hopper GPU; use <gemm=loop>")
    return DeepGemm()


def _by_rows(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """Multiply each expert's block of `rows` [R, a] by its `matrices` [e, b, a] transposed."""
    places = place_rows(ends, len(rows))
    padded = spread(rows, places)
    product = padded.new_empty(len(padded), matrices.shape[1])
    deep_gemm.m_grouped_bf16_gemm_nt_contiguous(
        padded, matrices, product, places.ends, use_psum_layout=True
    )
    return product[places.row]
