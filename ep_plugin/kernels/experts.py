"""Memory-bound steps of the experts in Triton: each reads and writes every byte once.

The functions have the same names, arguments and results as their twins in `experts_torch`. One
program handles one row (or, in `transpose_rows`, one tile); a row's largest value never leaves
its program, so quantising costs no second pass. Rows behind the last expert's are not touched.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ep_plugin.e4m3 import E4M3, Columns8, Rows8, Weight8

ACTIVATIONS = {"swiglu": 0, "geglu": 1, "gelu": 2, "relu": 3}
GATED = ("swiglu", "geglu")
TILE = 128  # columns written by one program of transpose_rows
ALIGN = 16  # columns; a product wants each expert's to start at a 16-byte address


def _warps(width: int) -> int:
    return 4 if width <= 4096 else 8 if width <= 8192 else 16


@triton.jit
def _power_of_two_scale(largest):
    """Smallest power of two s with largest / s <= 448, from the bits of the quotient."""
    bits = (largest * (1.0 / 448.0)).to(tl.int32, bitcast=True)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(tl.int32)
    exponent = tl.minimum(tl.maximum(exponent, 1), 254)
    scale = (exponent << 23).to(tl.float32, bitcast=True)
    return tl.where(largest > 0, scale, 1.0)


@triton.jit
def _erf_gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _erf_gelu_slope(x):
    cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    return cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)


@triton.jit
def _activate(gate, up, ACT: tl.constexpr):
    """Activation of one row, and its slopes with respect to gate and up."""
    if ACT == 0:
        sigma = tl.sigmoid(gate)
        return gate * sigma * up, up * sigma * (1.0 + gate * (1.0 - sigma)), gate * sigma
    if ACT == 1:
        value = _erf_gelu(gate)
        return value * up, up * _erf_gelu_slope(gate), value
    if ACT == 2:
        return _erf_gelu(gate), _erf_gelu_slope(gate), gate
    return tl.maximum(gate, 0.0), (gate > 0).to(tl.float32), gate


@triton.jit
def _count_kernel(
    expert_ids, counts, num_choices, NUM_EXPERTS, BLOCK: tl.constexpr, E: tl.constexpr
):
    choice = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(expert_ids + choice, mask=choice < num_choices, other=-1).to(tl.int32)
    bucket = tl.where(expert < 0, NUM_EXPERTS, expert)
    bucket = tl.where(choice < num_choices, bucket, -1)
    column = tl.arange(0, E)
    hits = (bucket[:, None] == column[None, :]).to(tl.int32)
    row = tl.program_id(0) * (NUM_EXPERTS + 1)
    tl.store(counts + row + column, tl.sum(hits, axis=0), mask=column <= NUM_EXPERTS)


@triton.jit
def _scan_kernel(counts, num_blocks, NUM_EXPERTS, BLOCK: tl.constexpr):
    """Replace the counts of one bucket, block after block, by the sums of those before."""
    cell = tl.arange(0, BLOCK) * (NUM_EXPERTS + 1) + tl.program_id(0)
    inside = tl.arange(0, BLOCK) < num_blocks
    values = tl.load(counts + cell, mask=inside, other=0)
    tl.store(counts + cell, tl.cumsum(values, axis=0) - values, mask=inside)


@triton.jit
def _place_kernel(
    expert_ids, before, ends, order, place, num_choices, NUM_EXPERTS, BLOCK: tl.constexpr
):
    slot = tl.arange(0, BLOCK)
    choice = tl.program_id(0) * BLOCK + slot
    inside = choice < num_choices
    expert = tl.load(expert_ids + choice, mask=inside, other=-1).to(tl.int32)
    bucket = tl.where(expert < 0, NUM_EXPERTS, expert)
    same = (bucket[:, None] == bucket[None, :]) & (slot[None, :] < slot[:, None])
    earlier = tl.sum(same.to(tl.int32), axis=1)  # in this block
    start = tl.load(ends + bucket - 1, mask=bucket > 0, other=0)
    cell = tl.program_id(0) * (NUM_EXPERTS + 1) + bucket
    row = start + tl.load(before + cell, mask=inside, other=0) + earlier
    tl.store(order + row, choice, mask=inside)
    tl.store(place + choice, row, mask=inside)


def sort_choices(expert_ids: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Return the flat choice of each row [R] and the row of each choice [N, C], int32.

    A stable counting sort of `expert_ids` [N, C]; absent choices, -1, come last. `ends` [e] int32
    is the row behind each expert's last.
    """
    num_choices, num_experts = expert_ids.numel(), len(ends)
    order = torch.empty(num_choices, dtype=torch.int32, device=expert_ids.device)
    place = torch.empty(expert_ids.shape, dtype=torch.int32, device=expert_ids.device)
    if num_choices:
        block = 128
        num_blocks = triton.cdiv(num_choices, block)
        counts = order.new_empty(num_blocks, num_experts + 1)
        ids = expert_ids.contiguous()
        buckets = triton.next_power_of_2(num_experts + 1)
        _count_kernel[(num_blocks,)](
            *(ids, counts, num_choices, num_experts), BLOCK=block, E=buckets
        )
        _scan_kernel[(num_experts + 1,)](
            *(counts, num_blocks, num_experts), BLOCK=triton.next_power_of_2(num_blocks)
        )
        _place_kernel[(num_blocks,)](
            *(ids, counts, ends, order, place, num_choices, num_experts), BLOCK=block
        )
    return order, place


@triton.jit
def _spread_kernel(
    source, scales, place, ends, out, out_scales, num_experts, WIDTH,
    CHOICES: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # Token by token: each is read once, although it goes to several rows.
    last = tl.load(ends + num_experts - 1)
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    values = tl.load(source + token * WIDTH + column, mask=inside)
    if SCALED:
        scale = tl.load(scales + token)
    for choice in tl.static_range(CHOICES):
        row = tl.load(place + token * CHOICES + choice).to(tl.int64)
        if row < last:
            tl.store(out + row * WIDTH + column, values, mask=inside)
            if SCALED:
                tl.store(out_scales + row, scale)


def _spread(tokens: Tensor, scales: Tensor | None, place: Tensor, ends: Tensor) -> Rows8:
    (num_tokens, choices), width = place.shape, tokens.shape[1]
    out = tokens.new_empty(num_tokens * choices, width)
    out_scales = torch.empty(
        len(out) if scales is not None else 1, dtype=torch.float32, device=out.device
    )
    if out.numel():
        # Bytes are moved, so any dtype may be; eight at a time where rows allow it.
        unit = torch.int64 if width * tokens.element_size() % 8 == 0 else torch.uint8
        moved, target = tokens.view(unit), out.view(unit)
        block = triton.next_power_of_2(moved.shape[1])
        _spread_kernel[(num_tokens,)](
            *(moved, out_scales if scales is None else scales, place, ends, target, out_scales),
            *(len(ends), moved.shape[1]),
            CHOICES=choices,
            SCALED=scales is not None,
            BLOCK=block,
            num_warps=max(1, min(8, block // 256)),
        )
    return Rows8(out, out_scales)


def spread_rows(tokens: Tensor, place: Tensor, ends: Tensor) -> Tensor:
    """Return the token of `tokens` [N, X] of each row, rows at `place` [N, C]: [R, X]."""
    return _spread(tokens, None, place, ends).data


def spread_rows8(tokens: Rows8, place: Tensor, ends: Tensor) -> Rows8:
    """Return the token of `tokens` [N, X] of each row, rows at `place` [N, C]: [R, X]."""
    return _spread(tokens.data, tokens.scale, place, ends)


@triton.jit
def _sum_kernel(
    rows, place, ends, out, num_experts, WIDTH, CHOICES: tl.constexpr, BLOCK: tl.constexpr
):
    last = tl.load(ends + num_experts - 1)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for choice in tl.static_range(CHOICES):
        row = tl.load(place + token * CHOICES + choice).to(tl.int64)
        values = tl.load(rows + row * WIDTH + column, mask=inside & (row < last), other=0.0)
        total += values.to(tl.float32)
    tl.store(out + token * WIDTH + column, total.to(out.dtype.element_ty), mask=inside)


def sum_rows(rows: Tensor, place: Tensor, ends: Tensor) -> Tensor:
    """Return the sums in fp32 of each token's rows [R, X], absent choices left out: [N, X]."""
    (num_tokens, choices), width = place.shape, rows.shape[1]
    out = rows.new_empty(num_tokens, width)
    if out.numel():
        block = min(1024, triton.next_power_of_2(width))
        grid = (num_tokens, triton.cdiv(width, block))
        _sum_kernel[grid](
            *(rows, place, ends, out, len(ends), width),
            CHOICES=choices,
            BLOCK=block,
        )
    return out


@triton.jit
def _quantize_kernel(matrix, data, scales, WIDTH, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    values = tl.load(matrix + row * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    scale = _power_of_two_scale(tl.max(tl.abs(values)))
    tl.store(data + row * WIDTH + column, (values / scale).to(tl.float8e4nv), mask=inside)
    tl.store(scales + row, scale)


def quantize_rows(matrix: Tensor) -> Rows8:
    """Return `matrix` [R, X] in e4m3, each row with its own power of two."""
    num_rows, width = matrix.shape
    data = torch.empty_like(matrix, dtype=E4M3)
    scale = torch.empty(num_rows, dtype=torch.float32, device=matrix.device)
    if matrix.numel():
        block = triton.next_power_of_2(width)
        _quantize_kernel[(num_rows,)](
            *(matrix.contiguous(), data, scale, width), BLOCK=block, num_warps=_warps(block)
        )
    return Rows8(data, scale)


@triton.jit
def _activate_kernel(
    hidden, probs, order, ends, num_experts, out, scales, WIDTH,
    ACT: tl.constexpr, IS_GATED: tl.constexpr, FP8: tl.constexpr, BLOCK: tl.constexpr,
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
    value = value.to(hidden.dtype.element_ty).to(tl.float32)  # what bf16 would have carried
    if FP8:
        scale = _power_of_two_scale(tl.max(tl.abs(value)))
        tl.store(scales + row, scale)
        value = value / scale
    tl.store(out + row * WIDTH + column, value.to(out.dtype.element_ty), mask=inside)


def activate(
    hidden: Tensor, probs: Tensor, order: Tensor, ends: Tensor, activation: str, fp8: bool
) -> Tensor | Rows8:
    """Return activation(`hidden` [R, F or 2F]) times each row's of `probs` [N, C]: [R, F].

    In e4m3 when asked.
    """
    gated = activation in GATED
    num_rows, width = len(hidden), hidden.shape[1] // (2 if gated else 1)
    out = hidden.new_empty(num_rows, width, dtype=E4M3 if fp8 else hidden.dtype)
    scale = torch.empty(num_rows if fp8 else 1, dtype=torch.float32, device=hidden.device)
    if out.numel():
        block = triton.next_power_of_2(width)
        _activate_kernel[(num_rows,)](
            *(hidden, probs, order, ends, len(ends), out, scale, width),
            ACT=ACTIVATIONS[activation],
            IS_GATED=gated,
            FP8=fp8,
            BLOCK=block,
            num_warps=_warps(block),
        )
    return Rows8(out, scale) if fp8 else out


@triton.jit
def _activate_backward_kernel(
    grads, hidden, hidden_scales, probs, order, ends, num_experts, d_hidden, d_scales, out,
    out_scales, d_probs, WIDTH,
    ACT: tl.constexpr, IS_GATED: tl.constexpr, FP8: tl.constexpr, HIDDEN8: tl.constexpr,
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
    if HIDDEN8:
        hidden_scale = tl.load(hidden_scales + row)
        gate *= hidden_scale
        up *= hidden_scale
    grad = tl.load(grads + row * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    prob = tl.load(probs + flat).to(tl.float32)
    value, gate_slope, up_slope = _activate(gate, up, ACT)
    tl.store(d_probs + flat, tl.sum(tl.where(inside, grad * value, 0.0)))
    value = (value * prob).to(grads.dtype.element_ty).to(tl.float32)
    d_gate = (grad * prob * gate_slope).to(grads.dtype.element_ty).to(tl.float32)
    d_up = (grad * prob * up_slope).to(grads.dtype.element_ty).to(tl.float32)
    if FP8:
        scale = _power_of_two_scale(tl.max(tl.abs(value)))
        tl.store(out_scales + row, scale)
        value = value / scale
        largest = tl.max(tl.abs(d_gate))
        if IS_GATED:
            largest = tl.maximum(largest, tl.max(tl.abs(d_up)))
        scale = _power_of_two_scale(largest)
        tl.store(d_scales + row, scale)
        d_gate = d_gate / scale
        d_up = d_up / scale
    tl.store(out + row * WIDTH + column, value.to(out.dtype.element_ty), mask=inside)
    target = d_hidden + row * WIDTH * factor + column
    tl.store(target, d_gate.to(d_hidden.dtype.element_ty), mask=inside)
    if IS_GATED:
        tl.store(target + WIDTH, d_up.to(d_hidden.dtype.element_ty), mask=inside)


def activate_backward(
    grads: Tensor,
    hidden: Tensor | Rows8,
    probs: Tensor,
    order: Tensor,
    ends: Tensor,
    activation: str,
    fp8: bool,
) -> tuple[Tensor | Rows8, Tensor | Rows8, Tensor]:
    """Return gradients of `hidden` [R, F or 2F], the activation [R, F] again, those of `probs`.

    `grads` [R, F] are the activation's. The first two are in e4m3 when asked.
    """
    gated = activation in GATED
    num_rows, width = grads.shape
    kept = hidden.data if isinstance(hidden, Rows8) else hidden
    dtype = E4M3 if fp8 else grads.dtype
    d_hidden, out = torch.empty_like(kept, dtype=dtype), torch.empty_like(grads, dtype=dtype)
    scales = torch.empty(2, num_rows if fp8 else 1, dtype=torch.float32, device=grads.device)
    d_probs = torch.empty(probs.shape, dtype=torch.float32, device=grads.device)
    if grads.numel():
        block = triton.next_power_of_2(width)
        _activate_backward_kernel[(num_rows,)](
            *(grads, kept, hidden.scale if isinstance(hidden, Rows8) else scales),
            *(probs, order, ends, len(ends)),
            *(d_hidden, scales[0], out, scales[1], d_probs, width),
            ACT=ACTIVATIONS[activation],
            IS_GATED=gated,
            FP8=fp8,
            HIDDEN8=isinstance(hidden, Rows8),
            BLOCK=block,
            num_warps=_warps(block),
        )
    if fp8:
        return Rows8(d_hidden, scales[0]), Rows8(out, scales[1]), d_probs
    return d_hidden, out, d_probs


@triton.jit
def _columns_kernel(
    ends, row_of, expert_of, padded_ends, num_experts, BLOCK: tl.constexpr, ALIGN: tl.constexpr
):
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.full((BLOCK,), -1, tl.int32)
    expert = tl.zeros((BLOCK,), tl.int32)
    start = 0
    padded_start = 0
    for index in range(num_experts):
        end = tl.load(ends + index)
        padded_end = padded_start + (end - start + ALIGN - 1) // ALIGN * ALIGN
        mine = (column >= padded_start) & (column < padded_end)
        candidate = start + column - padded_start
        row = tl.where(mine & (candidate < end), candidate, row)
        expert = tl.where(mine, index, expert)
        if tl.program_id(0) == 0:
            tl.store(padded_ends + index, padded_end)
        start = end
        padded_start = padded_end
    tl.store(row_of + column, row)
    tl.store(expert_of + column, expert)


def pad_columns(num_rows: int, ends: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the row of each column [P] or -1, its expert [P], and the padded ends [e], int32.

    Each expert's rows are padded to a multiple of ALIGN columns; P is enough for any counts.
    """
    num_experts = len(ends)
    size = triton.cdiv(num_rows + num_experts * (ALIGN - 1), TILE) * TILE
    row, expert = torch.empty(2, size, dtype=torch.int32, device=ends.device)
    padded = torch.empty_like(ends)
    if size:
        _columns_kernel[(size // TILE,)](
            *(ends, row, expert, padded, num_experts), BLOCK=TILE, ALIGN=ALIGN
        )
    return row, expert, padded


@triton.jit
def _largest_kernel(
    scale, order, ends, out, choices, WIDTH, TOKENS: tl.constexpr, BLOCK: tl.constexpr
):
    expert = tl.program_id(0)
    end = tl.load(ends + expert)
    start = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    largest = tl.zeros((BLOCK,), tl.float32)
    for first in range(start, end, BLOCK):
        row = first + tl.arange(0, BLOCK)
        source = row
        if TOKENS:
            source = tl.load(order + row, mask=row < end, other=0) // choices
        largest = tl.maximum(largest, tl.load(scale + source, mask=row < end, other=0.0))
    whole = tl.max(largest)
    whole = tl.where(whole > 0, whole, 1.0)
    for first in range(0, WIDTH, BLOCK):
        column = first + tl.arange(0, BLOCK)
        tl.store(out + expert * WIDTH + column, whole, mask=column < WIDTH)


@triton.jit
def _transpose_kernel(
    data, scale, largest, order, row_of, expert_of, out, choices, WIDTH, NUM_COLUMNS,
    TOKENS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    feature = tl.program_id(1) * BLOCK_X + tl.arange(0, BLOCK_X)
    row = tl.load(row_of + column)
    present = row >= 0
    source = row
    if TOKENS:
        source = tl.load(order + row, mask=present, other=0) // choices
    whole = tl.load(largest + tl.load(expert_of + column) * WIDTH)
    ratio = tl.load(scale + source, mask=present, other=0.0) / whole
    there = present[:, None] & (feature < WIDTH)[None, :]
    start = source.to(tl.int64)[:, None] * WIDTH
    values = tl.load(data + start + feature[None, :], mask=there, other=0.0)
    moved = tl.where(there, values.to(tl.float32) * ratio[:, None], 0.0).to(tl.float8e4nv)
    target = out + feature[:, None].to(tl.int64) * NUM_COLUMNS + column[None, :]
    tl.store(target, tl.trans(moved), mask=(feature < WIDTH)[:, None])


def transpose_rows(
    rows: Rows8, columns: tuple[Tensor, Tensor, Tensor], order: Tensor, ends: Tensor, choices: int
) -> Columns8:
    """Return `rows` transposed and padded as `columns` says, an expert's largest scale for all.

    `choices` 0 says that `rows` are rows; else they are tokens with so many choices each.
    """
    row_of, expert_of, _ = columns
    width, size = rows.data.shape[1], len(row_of)
    out = rows.data.new_empty(width, size)
    largest = torch.empty(len(ends), width, dtype=torch.float32, device=ends.device)
    if size and width:
        _largest_kernel[(len(ends),)](
            *(rows.scale, order, ends, largest, choices, width), TOKENS=choices > 0, BLOCK=1024
        )
        _transpose_kernel[(size // TILE, triton.cdiv(width, 128))](
            *(rows.data, rows.scale, largest, order, row_of, expert_of, out, choices, width, size),
            TOKENS=choices > 0,
            BLOCK_R=TILE,
            BLOCK_X=128,
        )
    return Columns8(out, largest)


@triton.jit
def _transpose_weight_kernel(
    data, scale, largest, out, ROWS, WIDTH, BLOCK_R: tl.constexpr, BLOCK_X: tl.constexpr
):
    expert = tl.program_id(2)
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    feature = tl.program_id(1) * BLOCK_X + tl.arange(0, BLOCK_X)
    there = (row < ROWS)[:, None] & (feature < WIDTH)[None, :]
    matrix = expert.to(tl.int64) * ROWS * WIDTH
    start = matrix + row.to(tl.int64)[:, None] * WIDTH
    values = tl.load(data + start + feature[None, :], mask=there, other=0.0).to(tl.float32)
    ratio = tl.load(scale + expert * ROWS + row, mask=row < ROWS, other=0.0)
    moved = (values * (ratio / tl.load(largest + expert))[:, None]).to(tl.float8e4nv)
    target = out + matrix + feature.to(tl.int64)[:, None] * ROWS + row[None, :]
    tl.store(target, tl.trans(moved), mask=tl.trans(there))


def quantize_weight(weight: Tensor) -> tuple[Weight8, Weight8]:
    """Return `weight` [e, b, a] in e4m3 and its transpose [e, a, b], one scale for each expert."""
    num_experts, num_rows, width = weight.shape
    rows = quantize_rows(weight.reshape(-1, width))
    scale = rows.scale.view(num_experts, num_rows)
    largest = scale.amax(dim=1)
    out = rows.data.new_empty(num_experts, width, num_rows)
    if out.numel():
        grid = (triton.cdiv(num_rows, TILE), triton.cdiv(width, 128), num_experts)
        _transpose_weight_kernel[grid](
            *(rows.data, scale, largest, out, num_rows, width), BLOCK_R=TILE, BLOCK_X=128
        )
    straight = Weight8(rows.data.view(weight.shape), scale)
    return straight, Weight8(out, largest.unsqueeze(1).repeat(1, width))
