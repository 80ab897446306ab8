"""Kernels of the experts beside their twins, on any device; run with TRITON_INTERPRET=1 on the CPU.

A stored value may be one step of its dtype away, where the fp32 before it differed in the last bit.
Triton's interpreter moreover cuts bf16 and, in e4m3, loses the carry of a mantissa that rounds up
(31.8 becomes 16): there e4m3 is known to a factor of two, and the GPU's test is the strict one.
"""

import os
import sys
from typing import Any

import torch
from torch import Tensor

from ep_plugin.e4m3 import Rows8
from ep_plugin.kernels import experts as kernels
from ep_plugin.kernels import experts_torch as twins

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


def assert_near(found: Tensor | Rows8, expected: Tensor | Rows8, rows: int, what: str) -> None:
    """Each value of the first `rows` rows is at most one step of its dtype away."""
    dtype = expected.data.dtype
    x, y = values(found)[:rows], values(expected)[:rows]
    floor = y.abs().amax() * 2**-18 if y.numel() else 0.0  # of subnormals, and of cancellation
    assert bool(((x - y).abs() <= STEP[dtype] * y.abs() + floor).all()), what


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
    order, place = kernels.sort_choices(ids, ends)
    assert_same((order, place), twins.sort_choices(ids, ends), "sort_choices")
    rows = int(ends[-1])
    for dtype in (torch.float32, torch.bfloat16):
        source = torch.randn(tokens, width, device=device).to(dtype)
        found, expected = (m.spread_rows(source, place, ends)[:rows] for m in (kernels, twins))
        assert_same([found], [expected], "spread_rows")
        source = torch.randn(tokens * choices, width, device=device).to(dtype)
        source[rows:] = torch.nan  # nobody may read these
        sums = [module.sum_rows(source, place, ends) for module in (kernels, twins)]
        assert_near(*sums, tokens, "sum_rows")
    tokens8 = twins.quantize_rows(torch.randn(tokens, width, device=device))
    rows8 = twins.spread_rows8(tokens8, place, ends)
    spread = kernels.spread_rows8(tokens8, place, ends)
    assert_same([spread.data[:rows]], [rows8.data[:rows]], "spread_rows8")
    assert_same([spread.scale[:rows]], [rows8.scale[:rows]], "spread_rows8")
    padded = kernels.pad_columns(len(order), ends)
    assert_same(padded, twins.pad_columns(len(order), ends), "pad_columns")
    for matrix, count in ((rows8, 0), (tokens8, choices)):
        columns = kernels.transpose_rows(matrix, padded, order, ends, count)
        twin = twins.transpose_rows(matrix, padded, order, ends, count)
        assert_same([columns.scale], [twin.scale], "transpose_rows")
        assert_near(columns.data, twin.data, len(twin.data), "transpose_rows")


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


def check_blocks(tokens: int, experts: int, choices: int, width: int, device: str) -> None:
    """Rounding by blocks, along rows, along an expert's rows, and of weights."""
    _, ends = random_choices(tokens, experts, choices, device)
    rows, count = int(ends[-1]), tokens * choices
    matrix = torch.randn(count, width, device=device).bfloat16()
    matrix *= torch.logspace(-3, 3, count, device=device).unsqueeze(1)
    narrow = [module.quantize_blocks(matrix) for module in (kernels, twins)]
    assert_same([narrow[0].scale], [narrow[1].scale], "scale of blocks")
    assert_near(narrow[0].data, narrow[1].data, count, "quantize_blocks")
    wide = [module.dequantize_blocks(narrow[1]) for module in (kernels, twins)]
    assert_same(wide[:1], wide[1:], "dequantize_blocks")
    weight = torch.randn(experts, 2 * width, width, device=device).bfloat16()
    pairs = {
        "round_rows": [module.round_rows(matrix, ends)[:rows] for module in (kernels, twins)],
        "round_columns": [module.round_columns(matrix, ends)[:rows] for module in (kernels, twins)],
        "round_weight": [module.round_weight(weight) for module in (kernels, twins)],
    }
    for name, (found, expected) in pairs.items():
        largest = expected.float().abs().amax() if expected.numel() else 0.0
        limit = STEP[torch.float8_e4m3fn] * expected.float().abs() + largest * 2**-18
        assert bool(((found.float() - expected.float()).abs() <= limit).all()), name


def check_activations(width: int, device: str) -> None:
    ids, ends = random_choices(11, 4, 3, device)
    order, _ = twins.sort_choices(ids, ends)
    num_rows, rows = 33, int(ends[-1])
    for activation in kernels.ACTIVATIONS:
        full = width * (2 if activation in kernels.GATED else 1)
        for dtype in (torch.float32, torch.bfloat16):
            hidden = torch.randn(num_rows, full, device=device).to(dtype)
            grads = torch.randn(num_rows, width, device=device).to(dtype)
            hidden[rows:], grads[rows:] = torch.nan, torch.nan
            probs = torch.rand(11, 3, device=device)
            for fp8 in (False, True):
                args = (probs, order, ends, activation, fp8)
                active = [module.activate(hidden, *args) for module in (kernels, twins)]
                assert_near(active[0], active[1], rows, activation)
                for kept in (hidden, twins.quantize_rows(hidden)):
                    found = kernels.activate_backward(grads, kept, *args)
                    expected = twins.activate_backward(grads, kept, *args)
                    for x, y in zip(found[:2], expected[:2], strict=True):
                        assert_near(x, y, rows, f"{activation} backward")
                    assert torch.allclose(found[2], expected[2], rtol=1e-5, atol=1e-5)
                    assert bool(found[2].isfinite().all())


def check_all(device: str) -> None:
    torch.manual_seed(0)
    for tokens, experts, choices, width in ((13, 4, 3, 48), (200, 16, 2, 40), (1, 5, 1, 16)):
        check_moves(tokens, experts, choices, width, device)
    for tokens, width in ((30, 128), (200, 384)):
        check_blocks(tokens, 3, 2, width, device)
    for width in (16, 200):
        check_rounding(width, device)
        check_activations(width, device)


if __name__ == "__main__":
    check_all(sys.argv[1])
