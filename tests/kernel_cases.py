"""Kernels of the experts beside their twins, on any device; run with TRITON_INTERPRET=1 on the CPU.

A stored value may be one step of its dtype away, where the fp32 before it differed in the last bit.
Triton's interpreter moreover cuts bf16 and, in e4m3, loses the carry of a mantissa that rounds up
(31.8 becomes 16): there e4m3 is known to a factor of two, and the GPU's test is the strict one.
"""

import os
import sys
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ep_plugin.config import GATED
from ep_plugin.e4m3 import E4M3, Rows8
from ep_plugin.kernels import TILE, Target
from ep_plugin.kernels import experts as kernels
from ep_plugin.kernels import experts_torch as twins
from ep_plugin.kernels.rows import count_choices

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
STEP = {
    torch.float32: 2e-6,
    torch.bfloat16: 2**-7,
    torch.float8_e4m3fn: 2**-1 if INTERPRETED else 2**-3,
}


def values(matrix: Tensor | Rows8) -> Tensor:
    if isinstance(matrix, Rows8):
        return matrix.data.float() * matrix.scale.unsqueeze(1)
    return matrix.float()


def assert_near(
    found: Tensor | Rows8, expected: Tensor | Rows8, rows: int, what: str, step: float | None = None
) -> None:
    """Each value of the first `rows` rows is at most one step of its dtype away."""
    step = STEP[expected.data.dtype] if step is None else step
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


def check_moves(tokens: int, experts: int, choices: int, width: int, device: str) -> None:
    """Sorting, spreading, summing, padding and transposing: nothing is rounded, so all is equal."""
    ids, ends = random_choices(tokens, experts, choices, device)
    counts = torch.diff(ends, prepend=ends.new_zeros(1)).long()
    assert_same([count_choices(ids, experts)], [counts], "count_choices")
    order, place = kernels.sort_choices(ids, ends)
    assert_same((order, place), twins.sort_choices(ids, ends), "sort_choices")
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
        assert_near(*sums, tokens, "sum_rows")
        for number in (2, 3, 8, 9, 17):
            parts = [torch.randn(tokens, width, device=device).to(dtype) for _ in range(number)]
            sums = [module.sum_pieces(parts) for module in (kernels, twins)]
            if not INTERPRETED:
                assert_same(sums[:1], sums[1:], f"sum_pieces of {number}")
            assert_near(*sums, tokens, f"sum_pieces of {number}")
    tokens8 = twins.quantize_rows(torch.randn(tokens, width, device=device))
    rows8 = twins.spread_rows8(tokens8, place, ends)
    spread = kernels.spread_rows8(tokens8, place, ends)
    assert_same([spread.data[:rows]], [rows8.data[:rows]], "spread_rows8")
    assert_same([spread.scale[:rows]], [rows8.scale[:rows]], "spread_rows8")
    tiles, twin_tiles = (module.plan_tiles(len(order), ends) for module in (kernels, twins))
    assert_same(vars(tiles).values(), vars(twin_tiles).values(), "plan_tiles")
    size = TILE * int(tiles.ends[-1])
    for matrix, count in ((rows8, 0), (tokens8, choices)):
        columns = kernels.transpose_rows(matrix, tiles, order, ends, count)
        twin = twins.transpose_rows(matrix, tiles, order, ends, count)
        assert_same([columns.scale], [twin.scale], "transpose_rows")
        assert_near(columns.data[:, :size], twin.data[:, :size], len(twin.data), "transpose_rows")


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


def largest(matrix: Tensor, rows: list[int], columns: int) -> Tensor:
    """Return for each value the largest of its block: rows up to the given ends, some columns."""
    result, start = torch.empty_like(matrix, dtype=torch.float32), 0
    for end in rows:
        for first in range(0, matrix.shape[1], columns):
            block = (slice(start, end), slice(first, first + columns))
            result[block] = matrix[block].float().abs().amax() if end > start else 0.0
        start = end
    return result


def assert_rounded(found: Tensor, expected: Tensor, block: Tensor, what: str) -> None:
    """Equal bits; in the interpreter, that cuts subnormals, to their distance in a block.

    `block` is the largest value of each one's block; at least 224 times the block's scale.
    """
    assert found.dtype == expected.dtype == torch.bfloat16, what
    x, y = found[: len(block)].float(), expected[: len(block)].float()
    step = STEP[torch.float8_e4m3fn] * y.abs() + block * (2**-9 / 224)
    assert bool(((x - y).abs() <= (step if INTERPRETED else 0 * step)).all()), what


def uneven(rows: int, width: int, device: str) -> Tensor:
    """Return [R, X] bf16 over 50 powers of two, with a row and a column of zeros."""
    exponents = [torch.randint(-12, 12, (size,), device=device) for size in (rows, width)]
    scale = torch.exp2(exponents[0]).unsqueeze(1) * torch.exp2(exponents[1] + 9.0)
    matrix = torch.randn(rows, width, device=device) * scale
    matrix[rows // 2], matrix[:, width // 3] = 0, 0
    return matrix.bfloat16()


def check_blocks(tokens: int, experts: int, choices: int, width: int, device: str) -> None:
    """Rounding by blocks, along features and along an expert's rows, of rows and of tokens."""
    ids, ends = random_choices(tokens, experts, choices, device)
    order, place = twins.sort_choices(ids, ends)
    rows, source = int(ends[-1]), uneven(tokens, width, device)
    tiles = twins.plan_tiles(len(order), ends)
    starts = [0, *ends.tolist()[:-1]]
    matrix = uneven(tokens * choices, width, device)
    matrix[[start for start in starts if start < rows]] *= 2**12  # not to be seen one row before
    matrix[rows:] = torch.nan  # nobody may read these
    spans = [
        min(first + 128, end)
        for start, end in zip(starts, ends.tolist(), strict=True)
        for first in range(start, end, 128)
    ]

    def compare(step: Any, given: Tensor, by_rows: bool, what: str) -> None:
        edges, columns = (spans, 1) if by_rows else (list(range(1, rows + 1)), 128)
        found, expected = (step(module) for module in (kernels, twins))
        assert_rounded(found, expected, largest(given[:rows], edges, columns), what)

    compare(lambda m: m.round_rows(matrix, ends), matrix, False, "round_rows")
    compare(lambda m: m.round_columns(matrix, tiles, order, ends), matrix, True, "round_columns")
    narrow = [module.quantize_blocks(source) for module in (kernels, twins)]
    assert_same([narrow[0].scale], [narrow[1].scale], "scale of blocks")
    spread = twins.spread_rows(source, place, ends)
    for kept in (source, narrow[1]):
        compare(lambda m, t=kept: m.spread_blocks(t, place, ends), spread, False, "spread_blocks")
        turn = lambda m, t=kept: m.round_columns(t, tiles, order, ends, choices)  # noqa: E731
        compare(turn, spread, True, "round_columns of tokens")
    wide = [module.spread_blocks(narrow[1], place, ends)[:rows] for module in (kernels, twins)]
    assert_same(wide[:1], wide[1:], "spread_blocks of e4m3")
    wide = [twins.spread_blocks(blocks, place, ends) for blocks in narrow]
    compare(lambda m: wide[m is twins], spread, False, "quantize_blocks")


def check_weights_by_blocks(device: str) -> None:
    weight = uneven(3 * 256, 384, device)
    found, expected = (m.round_weight(weight.view(3, 256, 384)) for m in (kernels, twins))
    block = largest(weight, list(range(128, 769, 128)), 128)
    assert_rounded(found.flatten(0, 1), expected.flatten(0, 1), block, "round_weight")


def check_activations(width: int, device: str) -> None:
    tokens = 4 if INTERPRETED else 11  # it takes its time for each row
    ids, ends = random_choices(tokens, 4, 3, device)
    order, _ = twins.sort_choices(ids, ends)
    num_rows, rows = 3 * tokens, int(ends[-1])
    for activation in kernels.ACTIVATIONS:
        full = width * (2 if activation in GATED else 1)
        for dtype in (torch.float32, torch.bfloat16):
            hidden = torch.randn(num_rows, full, device=device).to(dtype)
            grads = torch.randn(num_rows, width, device=device).to(dtype)
            hidden[rows:], grads[rows:] = torch.nan, torch.nan
            probs = torch.rand(tokens, 3, device=device)
            for fp8 in (False, True):
                args = (probs, order, ends, activation, fp8)
                active = [module.activate(hidden, *args) for module in (kernels, twins)]
                assert_near(active[0], active[1], rows, activation)
                for kept in (hidden, twins.quantize_rows(hidden)):
                    found = kernels.activate_backward(grads, kept, *args)
                    expected = twins.activate_backward(grads, kept, *args)
                    for x, y in zip(found[:2], expected[:2], strict=True):
                        assert_near(x, y, rows, f"{activation} backward")
                    check_target(grads, kept, args, (found, expected), rows)
                    assert torch.allclose(found[2], expected[2], rtol=1e-5, atol=1e-5)
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
                there = at[:rows].long()
                if isinstance(found, Rows8):
                    found = Rows8(
                        found.data.view(torch.uint8)[there].view(E4M3), found.scale[there]
                    )
                else:
                    found = found[there]
                assert_near(found, wanted, rows, "backward into larger matrices")
            assert torch.allclose(d_probs, expected[2], rtol=1e-5, atol=1e-5)


def check_activation_by_blocks(device: str) -> None:
    """Rounding in the activation's pass gives the bits of rounding in the next; e4m3 is read."""
    ids, ends = random_choices(11, 4, 3, device)
    order, _ = twins.sort_choices(ids, ends)
    probs, rows = torch.rand(11, 3, device=device), int(ends[-1])
    for activation in kernels.ACTIVATIONS:
        full = 768 if activation in GATED else 384
        hidden, grads = torch.randn(33, full, device=device), torch.randn(33, 384, device=device)
        hidden = (hidden * torch.exp2(torch.arange(33, device=device) % 5).unsqueeze(1)).bfloat16()
        hidden[:, :128] *= 2**-3
        args = (probs, order, ends, activation, False)
        for module in (kernels, twins):
            found, plain = module.activate(hidden, *args, True), module.activate(hidden, *args)
            assert_same([found[:rows]], [module.round_rows(plain, ends)[:rows]], activation)
        kept = twins.quantize_blocks(hidden)
        pairs = [m.activate_backward(grads.bfloat16(), kept, *args) for m in (kernels, twins)]
        for x, y in zip(*pairs, strict=True):
            assert_near(x, y, rows if x.shape[1] > 3 else 11, f"{activation} backward, by blocks")


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


def check_products(rows: int, b: int, a: int, device: str) -> None:
    """The products in e4m3: rows by weights, weight gradients alone and added; float64 too.

    The interpreter multiplies no e4m3, so there the same kernels are given fp16.
    """
    ends = torch.tensor([rows // 3, rows // 3, rows - 2], dtype=torch.int32, device=device)
    inside, order = rows - 2, torch.arange(rows, dtype=torch.int32, device=device)
    tiles, dtype = twins.plan_tiles(rows, ends), torch.float16 if INTERPRETED else E4M3
    weight = torch.randn(3, b, a, device=device)
    weight8, _ = twins.quantize_weight(weight)
    matrices = [torch.randn(rows, size, device=device) for size in (b, a)]
    for matrix in matrices:
        matrix[inside:] = torch.nan  # nobody may read these
    left, right = map(twins.quantize_rows, matrices)

    def cast(narrow: Any) -> Any:
        return replace(narrow, data=narrow.data.to(dtype))

    found = kernels.multiply(cast(right), cast(weight8), ends, tiles)[:inside]
    twin = twins.multiply(right, weight8, ends, tiles)[:inside]
    wide = values(right).double()
    experts = weight8.data.double() * weight8.scale.unsqueeze(2)
    blocks = torch.tensor_split(wide, ends.tolist())[:-1]
    oracle = torch.cat([x @ w.T for x, w in zip(blocks, experts, strict=True)])
    for name, product in (("kernel", found), ("twin", twin)):
        assert float((product - oracle).norm() / oracle.norm()) < 4e-3, f"multiply, {name}"
    columns = [twins.transpose_rows(m, tiles, order, ends, 0) for m in (left, right)]
    operands = [cast(m) for m in columns]
    parts = [torch.tensor_split(values(m).double(), ends.tolist())[:-1] for m in (left, right)]
    oracle = torch.stack([x.T @ y for x, y in zip(*parts, strict=True)])
    for name, product in (
        ("kernel", kernels.multiply_columns(operands[0], operands[1], tiles)),
        ("twin", twins.multiply_columns(columns[0], columns[1], tiles)),
    ):
        assert float((product - oracle).norm() / oracle.norm()) < 4e-3, f"multiply_columns, {name}"
        assert not bool(product[1].any()), f"multiply_columns of no rows, {name}"
    parts = [torch.tensor_split(m.double(), ends.tolist())[:-1] for m in matrices]
    exact = torch.stack([x.T @ y for x, y in zip(*parts, strict=True)])
    assert float((oracle - exact).norm() / exact.norm()) < 0.06, "e4m3"
    before = torch.randn(3, b, a, device=device)
    sums, twin_sums = before.clone(), before.clone()
    kernels.add_wgrad8(sums, operands[0], operands[1], tiles)
    twins.add_wgrad8(twin_sums, columns[0], columns[1], tiles)
    for name, total in (("kernel", sums), ("twin", twin_sums)):
        # Tensor cores keep 14 bits of a sum of e4m3 products.
        assert float((total - before - oracle).norm() / oracle.norm()) < 1e-3, f"add_wgrad8, {name}"
    assert torch.equal(sums[1], before[1]), "add_wgrad8 of no rows"


def check_all(device: str) -> None:
    torch.manual_seed(0)
    for rows, b, a in ((40, 48, 32), (300, 160, 272), (300, 272, 160)):
        check_wgrad(rows, b, a, device)
        check_products(rows, b, a, device)
    for tokens, experts, choices, width in ((13, 4, 3, 48), (200, 16, 2, 40), (1, 5, 1, 16)):
        check_moves(tokens, experts, choices, width, device)
    for tokens, experts, width in ((30, 3, 128), (150, 2, 256), (140, 1, 128), (1, 8, 256)):
        check_blocks(tokens, experts, min(2, experts), width, device)
    for width in (16, 200):
        check_rounding(width, device)
        check_activations(width, device)
    check_weights_by_blocks(device)
    check_activation_by_blocks(device)


if __name__ == "__main__":
    check_all(sys.argv[1])
