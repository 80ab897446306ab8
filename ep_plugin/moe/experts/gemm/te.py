"""Grouped GEMM through Transformer Engine, as its GroupedLinear does it in bf16, fp16 and fp32.

One cuBLAS product per expert, spread over a few streams. With NVTE_USE_CUTLASS_GROUPED_GEMM=1 it is
one CUTLASS kernel on Hopper. Host syncs: one per call, to read the row counts on the host.
"""

from itertools import pairwise

import torch
from torch import Tensor

from ep_plugin.errors import ConfigError
from ep_plugin.moe.interfaces import GroupedGemm

try:
    from transformer_engine.pytorch.cpp_extensions import general_grouped_gemm
except (AssertionError, OSError) as error:  # mixed versions, or a library that does not load
    raise ImportError(f"transformer_engine does not load: {error}") from error


class TransformerEngineGemm:
    """general_grouped_gemm in all three directions; layouts are named as in column-major BLAS."""

    waits_for_host = True

    def forward(self, rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        return by_rows(rows, weight, counts_of(ends), weight.shape[1], "TN")

    def dgrad(self, grads: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        return by_rows(grads, weight, counts_of(ends), weight.shape[2], "NN")

    def wgrad(self, grads: Tensor, rows: Tensor, ends: Tensor) -> Tensor:
        return by_columns(grads, rows, counts_of(ends))


def build(in_features: int, out_features: int, dtype: torch.dtype) -> GroupedGemm:
    """Return the backend, for any size; raises ConfigError for a dtype it does not take."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ConfigError(f"<gemm=te> needs fp32, bf16 or fp16; got {dtype}; use <gemm=loop>")
    if not torch.cuda.is_available():
        raise ConfigError("<gemm=te> runs on CUDA alone, and no GPU is here; use <gemm=loop>")
    return TransformerEngineGemm()


def by_rows(rows: Tensor, weight: Tensor, counts: list[int], features: int, layout: str) -> Tensor:
    """Multiply each expert's block of `rows` [R, ...] by its weight: [R, features]."""
    product = rows.new_empty(len(rows), features)
    options = {"layout": layout, "grad": layout == "NN", "single_output": True}
    _multiply(list(weight.unbind()), _blocks(rows, counts), [product], counts, **options)
    return product


def by_columns(
    grads: Tensor, rows: Tensor, counts: list[int], total: Tensor | None = None
) -> Tensor:
    """Return the weight gradient [e, b, a] of `grads` [R, b] and `rows` [R, a].

    With `total` [e, b, a] fp32 it is added there, and `total` returned.
    """
    added = total is not None
    weight = rows.new_empty(len(counts), grads.shape[1], rows.shape[1]) if total is None else total
    a, b = _blocks(rows, counts), _blocks(grads, counts)
    _multiply(a, b, list(weight.unbind()), counts, layout="NT", grad=True, accumulate=added)
    return weight


def _multiply(
    a: list[Tensor], b: list[Tensor], out: list[Tensor], counts: list[int], **options: object
) -> None:
    """Write the products into `out`; an empty block's weight gradient becomes 0."""
    no_quantizers = [None] * len(a)
    general_grouped_gemm(a, b, out, no_quantizers, out[0].dtype, m_splits=counts, **options)


def counts_of(ends: Tensor) -> list[int]:
    """Return each expert's number of rows, of `ends` [e]; the host waits for the device."""
    return [end - start for start, end in pairwise([0, *ends.tolist()])]


def _blocks(rows: Tensor, counts: list[int]) -> list[Tensor]:
    """Return each expert's block of `rows` [R, ...], without the rows past the last block."""
    return list(torch.split(rows[: sum(counts)].contiguous(), counts))
