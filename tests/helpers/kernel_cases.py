"""Kernels of the experts beside their twins, on any device; run with TRITON_INTERPRET=1 on the CPU.

A stored value may be one step of its dtype away, where the fp32 before it differed in the last bit.
Triton's interpreter moreover cuts bf16 and, in e4m3, loses the carry of a mantissa that rounds up
(31.8 becomes 16): there e4m3 is known to a factor of two, and the GPU's test is the strict one.
"""

import os
import sys
from collections.abc import Iterable
from dataclasses import replace
from typing import Any
from unittest import mock

import sends_cases
import torch
from torch import Tensor

from ep_plugin.moe.config import GATED
from ep_plugin.moe.e4m3 import (
    E4M3,
    Blocks8,
    Rows8,
    Values8,
    Weight8,
    WeightBlocks8,
    whole_blocks,
)
from ep_plugin.moe.experts.gemm.loop import LoopGemm
from ep_plugin.moe.kernels import _on_any as twins
from ep_plugin.moe.kernels import _on_cuda as kernels
from ep_plugin.moe.kernels import bf16_product, blocks_torch, wgrad
from ep_plugin.moe.kernels import product as product8
from ep_plugin.moe.kernels.move_rows import count_choices
from ep_plugin.moe.kernels.types import TILE, Target
from ep_plugin.moe.rows import ExpertRows

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
STEP = {
    torch.float32: 2e-6,
    torch.bfloat16: 2**-7,
    torch.float8_e4m3fn: 2**-1 if INTERPRETED else 2**-3,
}


def values(matrix: Any) -> Tensor:
    if isinstance(matrix, Rows8):
        return matrix.data.float() * matrix.scale.unsqueeze(1)
    if isinstance(matrix, Weight8):
        return matrix.data.float() * matrix.scale.unsqueeze(2)
    if isinstance(matrix, Blocks8):
        return blocks_torch.dequantize_blocks(matrix)
    if isinstance(matrix, WeightBlocks8):
        whole = blocks_torch.dequantize_weight_blocks(matrix)
        return whole[:, : matrix.width]
    wide: Tensor = matrix.float()
    return wide


def rows_of(matrix: Any, at: Tensor) -> Any:
    """Return some rows of a matrix, or of one in e4m3."""
    if isinstance(matrix, Tensor):
        return matrix[at]
    data = matrix.data.view(torch.uint8)[at].view(E4M3)
    return type(matrix)(data, matrix.scale[at])


def assert_near(found: Any, expected: Any, rows: int, what: str) -> None:
    """Each value of the first `rows` rows is at most one step of its dtype away."""
    step = STEP[expected.data.dtype]
    x, y = values(found)[:rows], values(expected)[:rows]
    # Of cancellation; and e4m3's subnormals are 2^-9 apart, where a row's largest value is 224.
    least = 2**-16 if expected.data.dtype == torch.float8_e4m3fn else 2**-18
    floor = y.abs().amax() * least if y.numel() else 0.0
    assert bool(((x - y).abs() <= step * y.abs() + floor).all()), what


def assert_same(found: Any, expected: Any, what: str) -> None:
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x.view(torch.uint8), y.view(torch.uint8)), what


def random_choices(tokens: int, experts: int, choices: int, device: str) -> tuple[Tensor, Tensor]:
    """Expert ids [N, C] with some absent, and the ends of the experts' rows [e]."""
    scores = torch.rand(tokens, experts, device=device)
    ids = scores.topk(choices, dim=1).indices
    ids[torch.rand(tokens, choices, device=device) < 0.25] = -1
    counts = torch.bincount(ids[ids >= 0], minlength=experts)
    return ids, counts.cumsum(0, dtype=torch.int32)


def sort(ids: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Return the order and the places of choices `ids` [N, C]; `ends` [e] of experts' rows."""
    counts = torch.diff(ends, prepend=ends.new_zeros(1)).long()
    return twins.sort_choices(ids, counts)[:2]


def check_moves(tokens: int, experts: int, choices: int, width: int, device: str) -> None:
    """Sorting, spreading, summing, padding and transposing: nothing is rounded, so all is equal."""
    ids, ends = random_choices(tokens, experts, choices, device)
    counts = torch.diff(ends, prepend=ends.new_zeros(1)).long()
    assert_same([count_choices(ids, experts)], [counts], "count_choices")
    order, place, sorted_ends = kernels.sort_choices(ids, counts)
    found = (order, place, sorted_ends)
    assert_same(found, twins.sort_choices(ids, counts), "sort_choices")
    assert_same([sorted_ends], [ends], "sort_choices, ends")
    rows = int(ends[-1])
    for dtype in (torch.float32, torch.bfloat16):
        source = torch.randn(tokens, width, device=device).to(dtype)
        found, expected = (m.spread_rows(source, place, ends)[:rows] for m in (kernels, twins))
        assert_same([found], [expected], "spread_rows")
        exact = [m.spread_rows(source, place, ends, rows) for m in (kernels, twins)]
        assert_same(exact, [expected, expected], "spread_rows, present choices alone")
        halves = zip(source.tensor_split(2), place.tensor_split(2), strict=True)
        pieces = [torch.zeros_like(expected) for _ in range(2)]
        for tokens_of, places in halves:
            for module, into in zip((kernels, twins), pieces, strict=True):
                module.spread_rows(tokens_of, places, ends, into=into)
        assert_same(pieces, [expected, expected], "spread_rows, in pieces")
        source = torch.randn(tokens * choices, width, device=device).to(dtype)
        source[rows:] = torch.nan  # nobody may read these
        sums = [module.sum_rows(source, place, ends) for module in (kernels, twins)]
        assert_near(sums[0], sums[1], tokens, "sum_rows")
        for number in (2, 3, 8, 9, 17):
            parts = [torch.randn(tokens, width, device=device).to(dtype) for _ in range(number)]
            sums = [module.sum_pieces(parts) for module in (kernels, twins)]
            if not INTERPRETED:
                assert_same(sums[:1], sums[1:], f"sum_pieces of {number}")
            assert_near(sums[0], sums[1], tokens, f"sum_pieces of {number}")
    tokens8 = twins.quantize_rows(torch.randn(tokens, width, device=device))
    rows8 = check_spread8(tokens8, place, ends)
    tiles, twin_tiles = (module.plan_tiles(len(order), ends) for module in (kernels, twins))
    assert_same(vars(tiles).values(), vars(twin_tiles).values(), "plan_tiles")
    size = TILE * int(tiles.ends[-1])
    for matrix, count in ((rows8, 0), (tokens8, choices)):
        columns = kernels.transpose_rows(matrix, tiles, order, ends, count)
        twin = twins.transpose_rows(matrix, tiles, order, ends, count)
        assert_same([columns.scale], [twin.scale], "transpose_rows")
        assert_near(columns.data[:, :size], twin.data[:, :size], len(twin.data), "transpose_rows")


def check_passes(ids: Tensor, ends: Tensor, width: int, size: int, device: str) -> None:
    """Parts of `size` rows one after another: spread as the whole is, and added to sums in fp32.

    The last parts have no rows. `ids` are [N, C], `ends` those of the experts' rows [e].
    """
    order, place = sort(ids, ends)
    where = ExpertRows(order, place, ends, False, "relu")
    tokens, rows = len(ids), int(ends[-1])
    for dtype in (torch.float32, torch.bfloat16):
        source = torch.randn(tokens, width, device=device).to(dtype)
        matrix = torch.randn(len(order), width, device=device).to(dtype)
        matrix[rows:] = torch.nan  # nobody may read these
        spread = twins.spread_rows(source, place, ends)
        before = torch.randn(tokens, width, device=device)
        for wide in {torch.float32, dtype}:
            sums = [before.to(wide, copy=True) for _ in range(2)]
            for first in range(0, len(order) + 1, size):
                part = where.part(first, min(first + size, len(order)))
                planned = part.place, part.ends
                mine = int(part.ends[-1])
                assert mine == min(max(rows - first, 0), len(part.order))
                found = kernels.spread_rows(source, *planned, len(part.order))
                assert_same([found[:mine]], [spread[first : first + mine]], "spread_rows of a part")
                unchanged = (part.place >= mine).all(1)
                old = sums[0].clone()
                for module, into in zip((kernels, twins), sums, strict=True):
                    assert module.sum_rows(matrix[first:][:size], *planned, into) is into
                assert_same([sums[0][unchanged]], [old[unchanged]], "sum_rows of no rows")
                if wide == torch.float32:
                    assert_near(sums[0], sums[1], tokens, "sum_rows of a part")
            if wide == torch.float32:
                exact = before + twins.sum_rows(matrix.float(), place, ends)
                assert float((sums[0] - exact).abs().amax()) < 1e-4, "sum_rows of all parts"


def check_no_rows(device: str) -> None:
    """With no rows at all nothing is added, and gradients of probabilities are 0."""
    rows, width, experts = 40, 256, 3
    ends = torch.zeros(experts, dtype=torch.int32, device=device)
    order = torch.arange(rows, dtype=torch.int32, device=device)
    probs = torch.full((rows, 1), torch.nan, device=device)
    garbage = torch.full((rows, width), torch.nan, device=device).bfloat16()
    tiles = kernels.plan_tiles(rows, ends)
    assert int(tiles.ends[-1]) == 0
    gated = garbage.repeat(1, 2)
    for scales in (None, "rows", "blocks"):
        args = (probs, order, ends, "swiglu", scales)
        assert len(kernels.activate(gated, *args).data) == rows
        d_hidden, _, d_probs = kernels.activate_backward(garbage, gated, *args)
        assert len(d_hidden.data) == rows
        assert not bool(d_probs.any())
    before = torch.randn(experts, width, width, device=device)
    half = garbage.half() if INTERPRETED else garbage
    totals = [before.clone() for _ in range(3)]
    kernels.add_wgrad(totals[0], half, half, ends)
    weight = torch.randn(experts, width, width, device=device)
    dtype = torch.float16 if INTERPRETED else E4M3
    for total, narrow in zip(totals[1:], OPS, strict=True):
        quantize_weight, quantize, transpose, multiply, _, add = OPS[narrow]
        rows8 = getattr(twins, quantize)(garbage)
        columns = getattr(kernels, transpose)(rows8, tiles, order, ends, 0)
        columns = replace(columns, data=columns.data.to(dtype))
        getattr(kernels, add)(total, columns, columns, tiles)
        weight8, _ = getattr(twins, quantize_weight)(weight)
        operands = (replace(m, data=m.data.to(dtype)) for m in (rows8, weight8))
        assert len(getattr(kernels, multiply)(*operands, ends, tiles)) == rows
    for total in totals:
        assert torch.equal(total, before)


def check_spread8(tokens: Values8, place: Tensor, ends: Tensor) -> Values8:
    """Return the rows as the twin has them."""
    rows = int(ends[-1])
    found, expected = (m.spread_rows8(tokens, place, ends) for m in (kernels, twins))
    assert_same([found.data[:rows]], [expected.data[:rows]], "spread_rows8")
    assert_same([found.scale[:rows]], [expected.scale[:rows]], "spread_rows8, scales")
    spread: Values8 = expected
    return spread


def check_rounding(width: int, device: str) -> None:
    """Quantising, over 60 binary orders of magnitude, and a row of zeros."""
    scale = torch.logspace(-9, 9, 33, device=device).unsqueeze(1)
    matrix = torch.randn(33, width, device=device) * scale
    matrix[5] = 0
    for dtype in (torch.float32, torch.bfloat16):
        found, expected = (m.quantize_rows(matrix.to(dtype)) for m in (kernels, twins))
        assert_same([found.scale], [expected.scale], "scale")
        assert float(expected.data.float().abs().amax()) <= 448
        for row in range(33):
            pair = [Rows8(m.data[row : row + 1], m.scale[row : row + 1]) for m in (found, expected)]
            assert_near(pair[0], pair[1], 1, f"quantize_rows, row {row}")
    weight = torch.randn(3, 40, width, device=device).bfloat16()
    pairs = zip(kernels.quantize_weight(weight), twins.quantize_weight(weight), strict=True)
    for found8, expected8 in pairs:
        assert_same([found8.scale], [expected8.scale], "scale of a weight")
        assert_near(found8.data, expected8.data, 3, "quantize_weight")


def assert_rounded(found: Any, expected: Any, what: str) -> None:
    """Equal scales and equal bits; the interpreter cuts, and makes 2^-7 of fp16's subnormals."""
    assert_same([found.scale], [expected.scale], f"{what}, scales")
    x, y = found.data.float(), expected.data.float()
    step = STEP[E4M3] * y.abs() + 2**-6 if INTERPRETED else 0 * y
    assert bool(((x - y).abs() <= step).all()), what


def uneven(rows: int, width: int, device: str) -> Tensor:
    """Return [R, X] bf16 over 50 powers of two, with a row and a column of zeros."""
    exponents = [torch.randint(-12, 12, (size,), device=device) for size in (rows, width)]
    scale = torch.exp2(exponents[0]).unsqueeze(1) * torch.exp2(exponents[1] + 9.0)
    matrix = torch.randn(rows, width, device=device) * scale
    matrix[rows // 2], matrix[:, width // 3] = 0, 0
    return matrix.bfloat16()


def check_blocks(tokens: int, experts: int, choices: int, width: int, device: str) -> None:
    """Rounding by blocks, spreading and transposing, of rows and of tokens."""
    ids, ends = random_choices(tokens, experts, choices, device)
    order, place = sort(ids, ends)
    tiles = twins.plan_tiles(len(order), ends)
    source = uneven(tokens, width, device)
    for dtype in (torch.float32, torch.bfloat16):
        pair = [module.quantize_blocks(source.to(dtype)) for module in (kernels, twins)]
        assert_rounded(pair[0], pair[1], "quantize_blocks")
    tokens8 = twins.quantize_blocks(source)
    check_spread8(tokens8, place, ends)
    rows8 = twins.quantize_blocks(uneven(tokens * choices, width, device))
    rows8.scale[int(ends[-1]) :] = torch.nan  # nobody may read these
    used = int(tiles.ends[-1])
    for matrix, count in ((rows8, 0), (tokens8, choices)):
        found, twin = (
            module.transpose_blocks(matrix, tiles, order, ends, count)
            for module in (kernels, twins)
        )
        parts = [
            replace(m, data=m.data[:, : used * TILE], scale=m.scale[:used]) for m in (found, twin)
        ]
        assert_rounded(parts[0], parts[1], "transpose_blocks")


def check_weights_by_blocks(device: str) -> None:
    """Also of sizes that are padded; what is padding are zeros, in each part."""
    for rows, width, parts in ((256, 384, 1), (256, 384, 2), (160, 200, 1), (160, 40, 2)):
        weight = uneven(3 * rows, width, device).view(3, rows, width)
        for dtype in (torch.float32, torch.bfloat16):
            pairs = (m.quantize_weight_blocks(weight.to(dtype), parts) for m in (kernels, twins))
            for found, expected in zip(*pairs, strict=True):
                assert_rounded(found, expected, "quantize_weight_blocks")
                assert found.width == expected.width == found.data.shape[1]
        straight, _ = twins.quantize_weight_blocks(weight, parts)
        whole = blocks_torch.dequantize_weight_blocks(straight).unflatten(1, (parts, -1))
        own = whole[:, :, : rows // parts, :width]
        assert float((own.flatten(1, 2) - weight).norm() / weight.float().norm()) < 0.05
        assert whole.count_nonzero() == own.count_nonzero()


def check_activations(
    width: int,
    narrows: tuple[Any, ...],
    device: str,
    activations: Iterable[str] = kernels.ACTIVATIONS,
) -> None:
    tokens = 4 if INTERPRETED else 11  # it takes its time for each row
    ids, ends = random_choices(tokens, 4, 3, device)
    order, _ = sort(ids, ends)
    num_rows, rows = 3 * tokens, int(ends[-1])
    quantize = {"rows": twins.quantize_rows, "blocks": twins.quantize_blocks}
    for activation in activations:
        full = width * (2 if activation in GATED else 1)
        for dtype in (torch.float32, torch.bfloat16):
            hidden = torch.randn(num_rows, full, device=device)
            hidden *= torch.exp2(torch.arange(full, device=device) // 128 % 3)
            if INTERPRETED:
                hidden.clamp_(-8, 8)  # it rounds subnormals of fp32, as slopes are, to other e4m3
            hidden, grads = (
                m.to(dtype) for m in (hidden, torch.randn(num_rows, width, device=device))
            )
            narrow8 = {name: quantize[name](hidden) for name in narrows if name}
            hidden[rows:], grads[rows:] = torch.nan, torch.nan
            probs = torch.rand(tokens, 3, device=device)
            for narrow in narrows:
                args = (probs, order, ends, activation, narrow)
                active = [module.activate(hidden, *args) for module in (kernels, twins)]
                assert_near(active[0], active[1], rows, activation)
                kept: Any
                for kept in (hidden, *narrow8.values()):
                    found = kernels.activate_backward(grads, kept, *args)
                    expected = twins.activate_backward(grads, kept, *args)
                    for x, y in zip(found[:2], expected[:2], strict=True):
                        assert_near(x, y, rows, f"{activation} backward")
                    check_target(grads, kept, args, (found, expected), rows)
                    assert_near(found[2], expected[2], tokens, f"{activation}, d_probs")
                    assert bool(found[2].isfinite().all())


def check_target(grads: Tensor, kept: Any, args: Any, own: Any, rows: int) -> None:
    """Rows of larger matrices, written in two calls, are those of matrices of their own."""
    num_rows = 2 * len(grads) + 1
    first = torch.randperm(num_rows, device=grads.device)[: len(grads)].int()
    left = torch.ones(num_rows, dtype=torch.bool, device=grads.device)
    left[first.long()] = False
    for module, expected in zip((kernels, twins), own, strict=True):
        matrices = None
        for at in (first, left.nonzero().flatten()[: len(grads)].int()):
            target = Target(at, num_rows, matrices)
            *matrices, d_probs = module.activate_backward(grads, kept, *args, target)
            for found, wanted in zip(matrices, expected[:2], strict=True):
                there = rows_of(found, at[:rows].long())
                assert_near(there, wanted, rows, "backward into larger matrices")
            assert_near(d_probs, expected[2], len(d_probs), "d_probs of larger matrices")


def check_wgrad(rows: int, b: int, a: int, device: str) -> None:
    """Added to what was there; an expert without rows adds nothing; against float64 too."""
    ends = torch.tensor([rows // 3, rows // 3, rows - 2], dtype=torch.int32, device=device)
    dtype = torch.float16 if INTERPRETED else torch.bfloat16  # it multiplies no bf16, nor e4m3
    left, right = (torch.randn(rows, size, device=device).to(dtype) for size in (b, a))
    left[rows - 2 :], right[rows - 2 :] = torch.nan, torch.nan  # nobody may read these
    before = torch.randn(3, b, a, device=device)
    found, twin = before.clone(), before.clone()
    kernels.add_wgrad(found, left, right, ends)
    twins.add_wgrad(twin, left, right, ends)
    parts = [torch.tensor_split(m.double(), ends.tolist())[:-1] for m in (left, right)]
    oracle = before + torch.stack([x.T @ y for x, y in zip(*parts, strict=True)])
    for name, sums in (("kernel", found), ("twin", twin)):
        assert float((sums - oracle).norm() / oracle.norm()) < 1e-6, f"add_wgrad, {name}"
    assert torch.equal(found[1], before[1]), "add_wgrad of no rows"


def check_bf16_products(counts: tuple[int, ...], b: int, a: int, device: str) -> None:
    """Forward and data gradient beside the loop's, and float64.

    Two rows behind the last expert's are NaN, as are the matrix of an expert without rows and the
    last row of each expert: none of them may reach another expert's rows.
    """
    dtype = torch.float16 if INTERPRETED else torch.bfloat16
    ends = torch.tensor(counts, device=device).cumsum(0).int()
    rows, last = int(ends[-1]) + 2, [end - 1 for end in ends.tolist() if end]
    inputs, grads = (
        torch.randn(rows, 2 * size, device=device).to(dtype)[:, ::2] for size in (a, b)
    )
    weight = torch.randn(len(counts), b, a, device=device).to(dtype)
    weight[[count == 0 for count in counts]] = torch.nan
    for matrix in (inputs, grads):
        matrix[[*last, rows - 2, rows - 1]] = torch.nan
    whole = torch.ones(rows, dtype=torch.bool, device=device)
    whole[[*last, rows - 2, rows - 1]] = False
    loop = LoopGemm()
    calls: dict[str, tuple[Any, Any, Tensor]] = {
        "multiply_rows": (bf16_product.multiply_rows, loop.forward, inputs),
        "multiply_grads": (bf16_product.multiply_grads, loop.dgrad, grads),
    }
    for name, (kernel, twin, matrix) in calls.items():
        oracle = twin(matrix.double(), weight.double(), ends)[whole]
        for kind, multiply in (("kernel", kernel), ("twin", twin)):
            found = multiply(matrix, weight, ends)
            assert (found.dtype, len(found)) == (dtype, rows)
            if not len(oracle):
                continue
            difference = (found[whole].double() - oracle).norm() / oracle.norm()
            assert float(difference) < 4e-3, f"{name} of {counts}, {kind}"


def check_planned(device: str) -> None:
    """Ends that are changed in place, other numbers of rows and other heights are planned anew."""
    dtype = torch.float16 if INTERPRETED else torch.bfloat16
    matrix, weight = torch.randn(200, 32, device=device), torch.randn(3, 40, 32, device=device)
    matrix, weight = matrix.to(dtype), weight.to(dtype)
    ends = torch.tensor([20, 20, 150], dtype=torch.int32, device=device)
    for changed, rows, few in (
        ([20, 20, 150], 200, 48),
        ([90, 140, 150], 200, 48),
        ([90, 140, 150], 200, 100),
        ([90, 140, 150], 150, 100),
    ):
        ends.copy_(torch.tensor(changed))
        with mock.patch.object(bf16_product, "FEW_ROWS", few):
            found = bf16_product.multiply_rows(matrix[:rows], weight, ends)[:150]
        expected = LoopGemm().forward(matrix[:rows].double(), weight.double(), ends)[:150]
        assert float((found.double() - expected).norm() / expected.norm()) < 4e-3, changed
    ends.copy_(torch.tensor([20, 20, 150]))
    if device == "cuda":
        before = ends.clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            product = bf16_product.multiply_rows(matrix, weight, ends)
        bf16_product.multiply_rows(matrix, weight, ends)
        for refilled in ([90, 140, 150], before):
            ends.copy_(torch.as_tensor(refilled))
            graph.replay()
            expected = LoopGemm().forward(matrix.double(), weight.double(), ends)[:150]
            assert float((product[:150].double() - expected).norm() / expected.norm()) < 4e-3


OPS: dict[str, tuple[str, ...]] = {
    "rows": (
        *("quantize_weight", "quantize_rows", "transpose_rows"),
        *("multiply", "multiply_columns", "add_wgrad8"),
    ),
    "blocks": (
        *("quantize_weight_blocks", "quantize_blocks", "transpose_blocks"),
        *("multiply_blocks", "multiply_column_blocks", "add_wgrad_blocks"),
    ),
}


def check_products(narrow: str, rows: int, b: int, a: int, device: str) -> None:
    """The products in e4m3: rows by weights, weight gradients alone and added; float64 too.

    The interpreter multiplies no e4m3, so there the same kernels are given fp16. By blocks, b and a
    may be padded, b in two parts if it is even; weight gradients are of `size`, without padding.
    """
    ends = torch.tensor([rows // 3, rows // 3, rows - 2], dtype=torch.int32, device=device)
    inside, order = rows - 2, torch.arange(rows, dtype=torch.int32, device=device)
    tiles, dtype = twins.plan_tiles(rows, ends), torch.float16 if INTERPRETED else E4M3
    quantize_weight, quantize, transpose = (getattr(twins, name) for name in OPS[narrow][:3])
    weight = torch.randn(3, b, a, device=device)
    weight8, _ = quantize_weight(weight)
    if narrow == "blocks":  # outputs without what is padding
        weight8 = replace(weight8, width=b)
    matrices = [torch.randn(rows, size, device=device) for size in (b, a)]
    for matrix in matrices:
        matrix *= torch.exp2(torch.arange(matrix.shape[1], device=device) // 128 % 3 * 2)
        matrix[inside:] = torch.nan  # nobody may read these
    halves = 2 if narrow == "blocks" and b % 2 == 0 else 1
    padded = matrices
    if halves == 2:  # as the gradients of gate and up come
        gap = whole_blocks(b // 2) - b // 2
        parts_of_left = matrices[0].unflatten(1, (2, -1))
        padded = [torch.nn.functional.pad(parts_of_left, (0, gap)).flatten(1), matrices[1]]
    left, right = map(quantize, padded)

    def cast(narrow8: Any) -> Any:
        return replace(narrow8, data=narrow8.data.to(dtype))

    def both(name: str, *operands: Any) -> list[tuple[str, Tensor]]:
        of_kernel = map(cast, operands)
        return [
            ("kernel", getattr(kernels, name)(*of_kernel, *planned)),
            ("twin", getattr(twins, name)(*operands, *planned)),
        ]

    multiply, multiply_columns, add = OPS[narrow][3:]
    planned: tuple[Any, ...] = ends, tiles
    blocks = torch.tensor_split(values(right).double(), ends.tolist())[:-1]
    oracle = torch.cat([x @ w.T for x, w in zip(blocks, values(weight8).double(), strict=True)])
    assert oracle.shape[1] == b
    for name, product in both(multiply, right, weight8):
        difference = (product[:inside] - oracle).norm() / oracle.norm()
        assert float(difference) < 4e-3, f"{multiply}, {name}"
    planned = (tiles,)
    columns = [transpose(m, tiles, order, ends, 0) for m in (left, right)]
    wide = [values(left).unflatten(1, (halves, -1))[:, :, : b // halves].flatten(1), values(right)]
    parts = [torch.tensor_split(m.double(), ends.tolist())[:-1] for m in (wide[0], wide[1][:, :a])]
    oracle = torch.stack([x.T @ y for x, y in zip(*parts, strict=True)])
    of_blocks: tuple[Any, ...] = ((b, a), halves) if narrow == "blocks" else ()
    planned = tiles, *of_blocks
    for name, product in both(multiply_columns, *columns):
        difference = (product - oracle).norm() / oracle.norm()
        assert float(difference) < 4e-3, f"{multiply_columns}, {name}"
        assert not bool(product[1].any()), f"{multiply_columns} of no rows, {name}"
    parts = [torch.tensor_split(m.double(), ends.tolist())[:-1] for m in matrices]
    exact = torch.stack([x.T @ y for x, y in zip(*parts, strict=True)])
    assert float((oracle - exact).norm() / exact.norm()) < 0.06, "e4m3"
    before = torch.randn(3, b, a, device=device)
    for name, module, operands in (
        ("kernel", kernels, [cast(m) for m in columns]),
        ("twin", twins, columns),
    ):
        total = before.clone()
        getattr(module, add)(total, *operands, tiles, *of_blocks[1:])
        # Tensor cores keep 14 bits of a sum of e4m3 products.
        difference = (total - before - oracle).norm() / oracle.norm()
        assert float(difference) < 1e-3, f"{add}, {name}"
        assert torch.equal(total[1], before[1]), f"{add} of no rows, {name}"


def laid_out(matrix: Tensor) -> list[Tensor]:
    """Return `matrix` [R, X] lying in memory in other ways: down columns, and with gaps."""
    wide = torch.full((len(matrix), 2 * matrix.shape[1]), torch.nan, device=matrix.device)
    wide = wide.to(matrix.dtype)
    wide[:, : matrix.shape[1]] = matrix
    return [matrix.T.contiguous().T, wide[:, : matrix.shape[1]]]


def parts(result: Any) -> list[Tensor]:
    """Return the tensors of a result: of a tensor, a record, or several of both."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, int):
        return []
    inside = result if isinstance(result, tuple) else vars(result).values()
    return [tensor for each in inside for tensor in parts(each)]


def check_layouts(device: str) -> None:
    """What is given lies in memory as its maker left it: every layout has the same bits."""
    tokens, experts, choices, width = 12, 4, 2, 128
    ids, ends = random_choices(tokens, experts, choices, device)
    order, place = sort(ids, ends)
    rows = tokens * choices
    probs = torch.rand(tokens, choices, device=device)
    gated = torch.randn(rows, 2 * width, device=device).bfloat16()
    few, many = (torch.randn(n, width, device=device).bfloat16() for n in (tokens, rows))
    calls: dict[str, tuple[Any, Tensor]] = {
        "spread_rows": (lambda m: kernels.spread_rows(m, place, ends)[: int(ends[-1])], few),
        "sum_rows": (lambda m: kernels.sum_rows(m, place, ends), many),
        "sum_pieces": (lambda m: kernels.sum_pieces([m, few]), few),
        "quantize_rows": (kernels.quantize_rows, few),
        "quantize_blocks": (kernels.quantize_blocks, few),
        "quantize_weight": (lambda m: kernels.quantize_weight(m.unsqueeze(0)), few),
        "quantize_weight_blocks": (
            lambda m: kernels.quantize_weight_blocks(m.unsqueeze(0)),
            torch.randn(128, 128, device=device).bfloat16(),
        ),
        "activate": (
            lambda m: kernels.activate(m, probs, order, ends, "swiglu")[: int(ends[-1])],
            gated,
        ),
        "activate_backward": (
            lambda m: tuple(
                matrix[: int(ends[-1])]
                for matrix in kernels.activate_backward(m, gated, probs, order, ends, "swiglu")[:2]
            ),
            many,
        ),
        "activate_backward of hidden": (
            lambda m: tuple(
                matrix[: int(ends[-1])]
                for matrix in kernels.activate_backward(many, m, probs, order, ends, "swiglu")[:2]
            ),
            gated,
        ),
    }
    for name, (call, matrix) in calls.items():
        expected = parts(call(matrix))
        for other in laid_out(matrix):
            assert_same(parts(call(other)), expected, f"{name} of strides {other.stride()}")


def check_all(device: str) -> None:
    torch.manual_seed(0)
    for rows, b, a in ((40, 48, 32), (300, 160, 272), (300, 272, 160)):
        check_wgrad(rows, b, a, device)
        check_products("rows", rows, b, a, device)
    check_planned(device)
    for counts, b, a in (
        ((13, 0, 25), 48, 32),
        ((0, 140, 0), 200, 88),  # sizes end inside of a step, and of a tile
        ((0, 0, 0), 64, 64),
        ((130,), 64, 64),
        ((70, 3, 0, 90, 1, 5, 64, 65, 1, 2), 520, 40),  # more than a band of tiles, three columns
    ):
        check_bf16_products(counts, b, a, device)
    for some in (1, 1024):  # as of more rows: higher tiles, of which some have a step more
        with mock.patch.multiple(bf16_product, FEW_ROWS=0, SOME_ROWS=some):
            check_bf16_products((100, 0, 200), 160, 272, device)
    with (  # and weight gradients by programs that go on
        mock.patch.object(product8, "FEW_ROWS", 0),
        mock.patch.object(wgrad, "MANY_EXPERTS", 0),
    ):
        check_products("rows", 300, 160, 272, device)
    with mock.patch.object(wgrad, "MANY_ROWS", 0):  # as of many rows: totals in wide tiles
        check_wgrad(300, 160, 272, device)
        check_products("rows", 300, 160, 272, device)
        with mock.patch.object(wgrad, "MANY_EXPERTS", 0):
            check_products("rows", 300, 160, 272, device)
    for rows, b, a in ((40, 128, 128), (300, 384, 256), (300, 256, 384)):
        check_products("blocks", rows, b, a, device)
    for rows, b, a in ((40, 80, 48), (140, 320, 200), (140, 129, 272), (40, 33, 15)):  # padded
        check_products("blocks", rows, b, a, device)
    for tokens, experts, choices, width in ((13, 4, 3, 48), (200, 16, 2, 40), (1, 5, 1, 16)):
        check_moves(tokens, experts, choices, width, device)
    for tokens, experts, choices, width, size in ((13, 4, 3, 48, 16), (37, 16, 2, 1030, 32)):
        ids, ends = random_choices(tokens, experts, choices, device)
        check_passes(ids, ends, width, size, device)
        one = torch.full_like(ids, 1)  # and the other experts get none
        ends = torch.bincount(one.flatten(), minlength=experts).cumsum(0, dtype=torch.int32)
        check_passes(one, ends, width, size, device)
        check_passes(torch.full_like(ids, -1), torch.zeros_like(ends), width, size, device)
    check_no_rows(device)
    shapes = (30, 3, 128), (150, 2, 256), (140, 1, 384), (1, 8, 256), (9, 2, 200)
    for tokens, experts, width in shapes:
        check_blocks(tokens, experts, min(2, experts), width, device)
    for width, narrow in ((16, "rows"), (200, None)):
        check_rounding(width, device)
        check_activations(width, (narrow,) if INTERPRETED else (None, "rows"), device)
    check_activations(384, ("blocks",), device)
    for width in () if INTERPRETED else (4096, 6016, 14336):  # 8, 16 and 32 warps
        check_activations(width, ("rows",), device, ["swiglu"])
    check_weights_by_blocks(device)
    check_layouts(device)
    sends_cases.check_all(device)


if __name__ == "__main__":
    check_all(sys.argv[1])
