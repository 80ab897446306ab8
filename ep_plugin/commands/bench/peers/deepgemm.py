"""DeepGEMM's grouped products in e4m3: scales of 1 x 128 for rows, 128 x 128 for weights.

Each expert's rows are padded as it demands, and the time of the padding rows is its own. The weight
gradient adds to an fp32 output and needs the counts on the host; both are how it is meant to run.
"""

from collections.abc import Callable

import deep_gemm
import torch
from deep_gemm.utils import per_block_cast_to_fp8, per_channel_cast_to_fp8, per_token_cast_to_fp8
from torch import Tensor

from ep_plugin.commands.bench.case import require_cuda
from ep_plugin.commands.bench.floors import Direction, Precision
from ep_plugin.commands.bench.products import Problem, Product

Scaled = tuple[Tensor, Tensor]


def build(problem: Problem, precision: Precision) -> list[Product]:
    """Return the products; only fp8 is a peer here."""
    require_cuda("deepgemm", problem.weight.device)
    if precision != "fp8":
        return []
    runs: dict[Direction, Callable[[int], Tensor]] = {
        "forward": _by_rows(problem, problem.rows, problem.weight),
        "dgrad": _by_rows(problem, problem.grads, problem.weight.transpose(1, 2)),
    }
    made = [Product("deepgemm", precision, d, run) for d, run in runs.items()]
    return [*made, _by_columns(problem)]


def _padded(matrix: Tensor, ends: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """Return `matrix` with zero rows between experts, each row's expert or -1, padded counts."""
    unit = deep_gemm.get_mk_alignment_for_contiguous_layout()
    blocks = torch.tensor_split(matrix, ends[:-1].long().cpu())
    sizes = [-(-len(block) // unit) * unit for block in blocks]
    out = matrix.new_zeros(sum(sizes), matrix.shape[1])
    layout = torch.full((len(out),), -1, dtype=torch.int32, device=matrix.device)
    start = 0
    for expert, (block, size) in enumerate(zip(blocks, sizes, strict=True)):
        out[start : start + len(block)] = block
        layout[start : start + len(block)] = expert
        start += size
    return out, layout, sizes


def _by_rows(
    problem: Problem, matrices: tuple[Tensor, ...], weight: Tensor
) -> Callable[[int], Tensor]:
    """rows [R, a] times `weight` [e, b, a] transposed: forward, and data gradient."""
    parts = [per_block_cast_to_fp8(expert.contiguous(), use_ue8m0=False) for expert in weight]
    right: Scaled = (torch.stack([p[0] for p in parts]), torch.stack([p[1] for p in parts]))
    lefts: list[Scaled] = []
    layouts = []
    for matrix, ends in zip(matrices, problem.ends, strict=True):
        padded, layout, _ = _padded(matrix, ends)
        data, scale = per_token_cast_to_fp8(padded, use_ue8m0=False)
        lefts.append((data, deep_gemm.get_mn_major_tma_aligned_tensor(scale)))
        layouts.append(layout)
    largest = max(len(layout) for layout in layouts)
    outs = matrices[0].new_empty(largest, weight.shape[1])

    def run(index: int) -> Tensor:
        out = outs[: len(layouts[index])]
        deep_gemm.m_grouped_fp8_gemm_nt_contiguous(lefts[index], right, out, layouts[index])
        return out

    return run


def _by_columns(problem: Problem) -> Product:
    """Gradients [R, b] transposed times rows [R, a], added to fp32 [e, b, a]."""
    operands = [
        (*(_columns(m[i], problem.ends[i]) for m in (problem.grads, problem.rows)),)
        for i in range(len(problem.rows))
    ]
    sizes = [_padded(problem.rows[i][:, :1], ends)[2] for i, ends in enumerate(problem.ends)]
    on_device = [torch.tensor(s, dtype=torch.int32, device=problem.weight.device) for s in sizes]
    out = torch.zeros_like(problem.weight, dtype=torch.float32)

    def run(index: int) -> Tensor:
        left, right = operands[index]
        deep_gemm.k_grouped_fp8_gemm_nt_contiguous(
            left, right, out, sizes[index], on_device[index], out
        )
        return out

    return Product("deepgemm", "fp8", "wgrad", run, total=out)


def _columns(matrix: Tensor, ends: Tensor) -> Scaled:
    """Return each expert's block transposed, one after another, scales for 128 of its columns."""
    padded, _, sizes = _padded(matrix, ends)
    data, scale = per_channel_cast_to_fp8(padded, use_ue8m0=False)  # [P, X], [P / 128, X]
    blocks = torch.split(data, sizes)
    return torch.cat([block.T.flatten() for block in blocks]), scale.T
