"""The activation times the routing weight, and its backward; the results in e4m3 if asked.

One program handles one row. Rows past the last expert's (absent choices) are not touched.

Shapes: R rows of experts, N tokens, C choices of a token, F the FFN size. `hidden` is [R, F], or
[R, 2F] as [gate, up] for a gated activation. `probs` [N, C] are the routing weights. `order` [R]
int32 is each row's flat choice, an index into `probs.flatten()`. `ends` [e] int32 is the row after
each expert's last.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ep_plugin.moe.config import GATED
from ep_plugin.moe.e4m3 import BLOCK, E4M3, Blocks8, Rows8
from ep_plugin.moe.kernels._launch import jit, next_power_of_2
from ep_plugin.moe.kernels.quantize import power_of_two_scale
from ep_plugin.moe.kernels.types import Scales, Target

SWIGLU, GEGLU, GELU = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
RELU, GEGLU_TANH = tl.constexpr(3), tl.constexpr(4)
ACTIVATIONS = {
    "swiglu": SWIGLU.value,
    "geglu": GEGLU.value,
    "gelu": GELU.value,
    "relu": RELU.value,
    "geglu_tanh": GEGLU_TANH.value,
}


def _warps(width: int) -> int:
    """Return a program's warps: 16 values per thread, fastest on H100 for widths 768 to 14336."""
    return min(max(width // 512, 2), 32)


def _registers(warps: int, hidden: Tensor | Rows8 | Blocks8) -> int | None:
    """Return the limit of registers per thread in the backward; None for no limit.

    With at most 64 registers a multiprocessor runs two programs of 16 warps instead of one (27 %
    faster on H100), or four of 8 warps instead of three (9 % faster). Programs of fewer warps need
    no limit. Programs of 8 warps that read scales by blocks need more than 64.
    """
    return 64 if warps == 16 or (warps == 8 and not isinstance(hidden, Blocks8)) else None


@triton.jit
def _erf_gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _erf_gelu_slope(x):
    cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    return cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)


@triton.jit
def _sigmoid(x):
    """1 / (1 + e^-x) as a squared rsqrt: half the instructions of a division."""
    root = tl.rsqrt(1.0 + tl.exp2(x * -1.4426950408889634))
    return root * root


@triton.jit
def _activate(gate, up, ACT: tl.constexpr):
    """Return the activation of one row and its derivatives with respect to gate and up."""
    if ACT == SWIGLU:
        sigma = _sigmoid(gate)
        return gate * sigma * up, up * sigma * (1.0 + gate * (1.0 - sigma)), gate * sigma
    if ACT == GEGLU:
        value = _erf_gelu(gate)
        return value * up, up * _erf_gelu_slope(gate), value
    if ACT == GELU:
        return _erf_gelu(gate), _erf_gelu_slope(gate), gate
    if ACT == GEGLU_TANH:
        # x (1 + tanh u) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3) is x sigmoid(2 u)
        sigma = _sigmoid(gate * (1.5957691216057308 + 0.07135481627260025 * gate * gate))
        steep = 1.5957691216057308 + 0.21406444881780075 * gate * gate  # derivative of 2 u
        slope = sigma + gate * sigma * (1.0 - sigma) * steep
        return gate * sigma * up, up * slope, gate * sigma
    return tl.maximum(gate, 0.0), (gate > 0).to(tl.float32), gate


@triton.jit
def _scale(largest, DTYPE: tl.constexpr):
    """Return the scale of values that are rounded to DTYPE first, then to e4m3.

    A separate kernel would have read them from memory in DTYPE. Rounding keeps the order of values,
    so it is enough to round `largest`. Callers divide values by the scale, which is exact, before
    both roundings; the compiler then rounds two values in one instruction.
    """
    return power_of_two_scale(largest.to(DTYPE).to(tl.float32))


@triton.jit
def _to_e4m3(row, scales, BLOCK: tl.constexpr, SIZE: tl.constexpr, NUM_SCALES, DTYPE: tl.constexpr):
    """Store one scale for each SIZE values of a row; return the values divided by their scales."""
    blocks = tl.reshape(row, (BLOCK // SIZE, SIZE))
    scale = _scale(tl.max(tl.abs(blocks), axis=1), DTYPE)
    block = tl.arange(0, BLOCK // SIZE)
    tl.store(scales + block, scale, mask=block < NUM_SCALES)
    return tl.reshape(blocks * (1.0 / scale)[:, None], (BLOCK,))


@jit
def _activate_kernel(
    hidden, probs, order, ends, num_experts, out, scales, WIDTH,
    ACT: tl.constexpr, IS_GATED: tl.constexpr, ROWS8: tl.constexpr, BLOCKS8: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if row >= tl.load(ends + num_experts - 1):
        return
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    base = hidden + row * WIDTH * (2 if IS_GATED else 1)
    gate = tl.load(base + column, mask=inside, other=0.0).to(tl.float32)
    up = gate
    if IS_GATED:
        up = tl.load(base + WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    value, _, _ = _activate(gate, up, ACT)
    value = value * tl.load(probs + tl.load(order + row)).to(tl.float32)
    carried: tl.constexpr = hidden.dtype.element_ty
    if ROWS8:
        scale = _scale(tl.max(tl.abs(value)), carried)
        tl.store(scales + row, scale)
        value *= 1.0 / scale
    if BLOCKS8 > 0:
        num_scales = WIDTH // BLOCKS8
        value = _to_e4m3(value, scales + row * num_scales, BLOCK, BLOCKS8, num_scales, carried)
    small = value.to(carried).to(out.dtype.element_ty)
    tl.store(out + row * WIDTH + column, small, mask=inside)


def activate(
    hidden: Tensor,
    probs: Tensor,
    order: Tensor,
    ends: Tensor,
    activation: str,
    scales: Scales | None = None,
) -> Tensor | Rows8 | Blocks8:
    """Return activation(`hidden` [R, F or 2F]) times each row's entry of `probs`: [R, F].

    With `scales` None the dtype is that of `hidden`; otherwise e4m3 with one scale per row, or per
    128 features (F is then a multiple of 128). See the top of `kernels.activation` for shapes.
    """
    gated = activation in GATED
    num_rows, width = hidden.shape[0], hidden.shape[1] // (2 if gated else 1)
    active = _empty(num_rows, width, scales, hidden)
    data, scale = _parts(active, ends)
    if data.numel():
        block = next_power_of_2(width)
        _activate_kernel[(num_rows,)](
            *(hidden.contiguous(), probs, order, ends, ends.shape[0], data, scale, width),
            ACT=ACTIVATIONS[activation],
            IS_GATED=gated,
            ROWS8=scales == "rows",
            BLOCKS8=BLOCK if scales == "blocks" else 0,
            BLOCK=block,
            num_warps=_warps(block),
        )
    return active


@jit
def _activate_backward_kernel(
    grads, hidden, hidden_scales, probs, order, at, ends, num_experts, d_hidden, d_scales, out,
    out_scales, d_probs, WIDTH,
    ACT: tl.constexpr, IS_GATED: tl.constexpr, ROWS8: tl.constexpr, BLOCKS8: tl.constexpr,
    HIDDEN_ROWS8: tl.constexpr, HIDDEN_BLOCKS8: tl.constexpr, AT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    flat = tl.load(order + row)
    if row >= tl.load(ends + num_experts - 1):
        tl.store(d_probs + flat, 0.0)
        return
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    factor = 2 if IS_GATED else 1
    base = hidden + row * WIDTH * factor
    gate = tl.load(base + column, mask=inside, other=0.0).to(tl.float32)
    up = gate
    if IS_GATED:
        up = tl.load(base + WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    if HIDDEN_ROWS8:
        hidden_scale = tl.load(hidden_scales + row)
        gate *= hidden_scale
        up *= hidden_scale
    if HIDDEN_BLOCKS8 > 0:
        num_scales = WIDTH // HIDDEN_BLOCKS8
        cell = hidden_scales + row * factor * num_scales + column // HIDDEN_BLOCKS8
        gate *= tl.load(cell, mask=inside, other=0.0)
        if IS_GATED:
            up *= tl.load(cell + num_scales, mask=inside, other=0.0)
        else:
            up = gate
    grad = tl.load(grads + row * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    if AT:
        row = tl.load(at + row).to(tl.int64)
    prob = tl.load(probs + flat).to(tl.float32)
    value, gate_slope, up_slope = _activate(gate, up, ACT)
    tl.store(d_probs + flat, tl.sum(tl.where(inside, grad * value, 0.0)))
    value *= prob
    d_gate = grad * prob * gate_slope
    d_up = grad * prob * up_slope
    carried: tl.constexpr = grads.dtype.element_ty
    if ROWS8:
        scale = _scale(tl.max(tl.abs(value)), carried)
        tl.store(out_scales + row, scale)
        value *= 1.0 / scale
        largest = tl.max(tl.abs(d_gate))
        if IS_GATED:
            largest = tl.maximum(largest, tl.max(tl.abs(d_up)))
        scale = _scale(largest, carried)
        tl.store(d_scales + row, scale)
        d_gate *= 1.0 / scale
        d_up *= 1.0 / scale
    if BLOCKS8 > 0:
        each = WIDTH // BLOCKS8  # scales of one row of the activation
        value = _to_e4m3(value, out_scales + row * each, BLOCK, BLOCKS8, each, carried)
        start = d_scales + row * factor * each
        d_gate = _to_e4m3(d_gate, start, BLOCK, BLOCKS8, each, carried)
        if IS_GATED:
            d_up = _to_e4m3(d_up, start + each, BLOCK, BLOCKS8, each, carried)
    stored: tl.constexpr = out.dtype.element_ty
    tl.store(out + row * WIDTH + column, value.to(carried).to(stored), mask=inside)
    target = d_hidden + row * WIDTH * factor + column
    tl.store(target, d_gate.to(carried).to(stored), mask=inside)
    if IS_GATED:
        tl.store(target + WIDTH, d_up.to(carried).to(stored), mask=inside)


def activate_backward(
    grads: Tensor,
    hidden: Tensor | Rows8 | Blocks8,
    probs: Tensor,
    order: Tensor,
    ends: Tensor,
    activation: str,
    scales: Scales | None = None,
    target: Target | None = None,
) -> tuple[Any, Any, Tensor]:
    """Return the gradient of `hidden`, the recomputed activation [R, F], the gradient of `probs`.

    `grads` [R, F] is the gradient of the activation's output. The first two results are in e4m3 if
    `scales` says so. With a `target` they are written into its larger matrices, and those are
    returned. The gradient of `probs` [N, C] is 0 for absent choices.
    """
    gated = activation in GATED
    num_rows, width = grads.shape
    kept, kept_scale = _parts(hidden, ends)
    if target is not None and target.matrices is not None:
        found = target.matrices
    else:
        rows = num_rows if target is None else target.num_rows
        found = tuple(_empty(rows, like.shape[1], scales, grads) for like in (kept, grads))
    (d_hidden, d_scales), (out, out_scales) = (_parts(matrix, ends) for matrix in found)
    make = torch.empty if num_rows == probs.numel() else torch.zeros  # absent choices have no row
    d_probs = make(probs.shape, dtype=torch.float32, device=grads.device)
    if grads.numel():
        block = next_power_of_2(width)
        warps = _warps(block)
        _activate_backward_kernel[(num_rows,)](
            *(grads.contiguous(), kept.contiguous(), kept_scale, probs, order),
            *(order if target is None else target.at, ends, ends.shape[0]),
            *(d_hidden, d_scales, out, out_scales, d_probs, width),
            ACT=ACTIVATIONS[activation],
            IS_GATED=gated,
            ROWS8=scales == "rows",
            BLOCKS8=BLOCK if scales == "blocks" else 0,
            HIDDEN_ROWS8=isinstance(hidden, Rows8),
            HIDDEN_BLOCKS8=BLOCK if isinstance(hidden, Blocks8) else 0,
            AT=target is not None,
            BLOCK=block,
            num_warps=warps,
            maxnreg=_registers(warps, hidden),
        )
    return *found, d_probs


def _parts(matrix: Tensor | Rows8 | Blocks8, without: Tensor) -> tuple[Tensor, Tensor]:
    """Return the values of `matrix` and its scales, `without` where it has none."""
    return (matrix, without) if isinstance(matrix, Tensor) else (matrix.data, matrix.scale)


def _empty(rows: int, width: int, scales: Scales | None, like: Tensor) -> Tensor | Rows8 | Blocks8:
    if scales is None:
        return like.new_empty(rows, width)
    data = like.new_empty(rows, width, dtype=E4M3)
    if scales == "rows":
        return Rows8(data, like.new_empty(rows, dtype=torch.float32))
    return Blocks8(data, like.new_empty(rows, width // BLOCK, dtype=torch.float32))
