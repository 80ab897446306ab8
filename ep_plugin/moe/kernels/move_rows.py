"""Moving tokens to rows of experts and back: sorting choices, copying tokens, summing rows.

One program handles one token, or one block of choices. Rows past the last expert's (absent choices)
are not touched.

Shapes: N tokens with C choices each, e local experts, R rows of experts, X features. `place` [N, C]
int32 is the row of each choice. `ends` [e] int32 is the row after each expert's last.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ep_plugin.moe.e4m3 import Values8
from ep_plugin.moe.kernels._launch import cdiv, jit, next_power_of_2


@jit
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


@jit
def _total_kernel(
    expert_ids, totals, num_choices, NUM_EXPERTS, BLOCK: tl.constexpr, E: tl.constexpr
):
    choice = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(expert_ids + choice, mask=choice < num_choices, other=-1).to(tl.int32)
    column = tl.arange(0, E)
    hits = tl.sum((expert[:, None] == column[None, :]).to(tl.int64), axis=0)
    tl.atomic_add(totals + column, hits, mask=(column < NUM_EXPERTS) & (hits > 0))


def count_choices(expert_ids: Tensor, num_experts: int) -> Tensor:
    """Return how many of `expert_ids` [N, C] (-1: absent) name each expert: [e] int64."""
    totals = torch.zeros(num_experts, dtype=torch.int64, device=expert_ids.device)
    if expert_ids.numel():
        buckets = next_power_of_2(num_experts)
        block = max(16, min(512, 8192 // buckets))
        _total_kernel[(cdiv(expert_ids.numel(), block),)](
            *(expert_ids.contiguous(), totals, expert_ids.numel(), num_experts),
            BLOCK=block,
            E=buckets,
        )
    return totals


@jit
def _scan_kernel(
    counts, of_experts, ends, num_blocks, NUM_EXPERTS, BLOCK: tl.constexpr, E: tl.constexpr
):
    """Replace the counts of one bucket in all blocks by their exclusive prefix sums.

    And write the row after its last.
    """
    expert = tl.arange(0, E)
    mine = expert <= tl.program_id(0)
    until = tl.load(of_experts + expert, mask=mine & (expert < NUM_EXPERTS), other=0)
    if tl.program_id(0) < NUM_EXPERTS:
        tl.store(ends + tl.program_id(0), tl.sum(until).to(tl.int32))
    cell = tl.arange(0, BLOCK) * (NUM_EXPERTS + 1) + tl.program_id(0)
    inside = tl.arange(0, BLOCK) < num_blocks
    values = tl.load(counts + cell, mask=inside, other=0)
    tl.store(counts + cell, tl.cumsum(values, axis=0) - values, mask=inside)


@jit
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


def sort_choices(expert_ids: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return `order` [N * C], the flat choice of each row; `place` [N, C]; `ends` [e]; all int32.

    `place` is the row of each choice, `ends` the row after each expert's last. It is a stable
    counting sort of `expert_ids` [N, C]; absent choices, -1, come last. `counts` [e] int64 says how
    many are each expert's.
    """
    num_choices, num_experts = expert_ids.numel(), counts.shape[0]
    order = torch.empty(num_choices, dtype=torch.int32, device=expert_ids.device)
    place = order.new_empty(expert_ids.shape)
    if not num_choices:
        return order, place, order.new_zeros(num_experts)
    ends = order.new_empty(num_experts)
    block = 128
    num_blocks = cdiv(num_choices, block)
    before = order.new_empty(num_blocks, num_experts + 1)
    ids = expert_ids.contiguous()
    buckets = next_power_of_2(num_experts + 1)
    _count_kernel[(num_blocks,)](*(ids, before, num_choices, num_experts), BLOCK=block, E=buckets)
    _scan_kernel[(num_experts + 1,)](
        *(before, counts.contiguous(), ends, num_blocks, num_experts),
        BLOCK=next_power_of_2(num_blocks),
        E=buckets,
    )
    _place_kernel[(num_blocks,)](
        *(ids, before, ends, order, place, num_choices, num_experts), BLOCK=block
    )
    return order, place, ends


@triton.jit
def _first_row(place, token, last, CHOICES: tl.constexpr):
    """Return the first of a token's rows; `last` or more where none is before `last`."""
    first = last
    for choice in tl.static_range(CHOICES):
        first = tl.minimum(first, tl.load(place + token * CHOICES + choice))
    return first


@jit
def _spread_kernel(
    source, scales, place, ends, out, out_scales, num_experts, WIDTH, NUM_SCALES,
    SOME: tl.constexpr, CHOICES: tl.constexpr, SCALES: tl.constexpr, BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    # One program per token: it reads the token once and writes it to several rows. WIDTH is in
    # units of 8 bytes with WIDE, else of 1: a view of another dtype costs the host a tensor.
    unit: tl.constexpr = tl.pointer_type(tl.int64 if WIDE else tl.uint8)
    source = source.to(unit, bitcast=True)
    out = out.to(unit, bitcast=True)
    last = tl.load(ends + num_experts - 1)
    token = tl.program_id(0).to(tl.int64)
    if SOME:  # noqa: SIM102
        if _first_row(place, token, last, CHOICES) >= last:
            return
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    values = tl.load(source + token * WIDTH + column, mask=inside)
    if SCALES > 0:
        of = tl.arange(0, SCALES)
        scale = tl.load(scales + token * NUM_SCALES + of, mask=of < NUM_SCALES)
    for choice in tl.static_range(CHOICES):
        row = tl.load(place + token * CHOICES + choice).to(tl.int64)
        if row < last:
            tl.store(out + row * WIDTH + column, values, mask=inside)
            if SCALES > 0:
                tl.store(out_scales + row * NUM_SCALES + of, scale, mask=of < NUM_SCALES)


def _spread(
    tokens: Tensor,
    scales: Tensor | None,
    place: Tensor,
    ends: Tensor,
    num_rows: int | None,
    into: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return rows and their scales. Without `scales` the second result has no meaning."""
    (num_tokens, choices), width = place.shape, tokens.shape[1]
    if into is None:
        into = tokens.new_empty(num_tokens * choices if num_rows is None else num_rows, width)
    each, out_scales = 0, ends  # scales of a token
    if scales is not None:
        shape = scales.shape[1:]
        each, out_scales = shape.numel(), scales.new_empty(into.shape[0], *shape)
    if into.numel() and num_tokens:
        # Rows are moved as bytes, so any dtype works; eight at a time if the row size allows it.
        size = width * tokens.element_size()
        wide = size % 8 == 0
        units = size // 8 if wide else size
        block = next_power_of_2(units)
        _spread_kernel[(num_tokens,)](
            *(tokens.contiguous(), ends if scales is None else scales.contiguous(), place, ends),
            *(into, out_scales, ends.shape[0], units, each),
            SOME=into.shape[0] < place.numel(),  # a token may have no row
            CHOICES=choices,
            SCALES=next_power_of_2(each) if each else 0,
            BLOCK=block,
            WIDE=wide,
            num_warps=max(1, min(8, block // 256)),
        )
    return into, out_scales


def spread_rows(
    tokens: Tensor,
    place: Tensor,
    ends: Tensor,
    num_rows: int | None = None,
    into: Tensor | None = None,
) -> Tensor:
    """Copy each token of `tokens` [N, X] to its rows `place` [N, C]; return the rows [R, X].

    R is `num_rows`, which must be at least `ends[-1]`; by default N * C. With `into` [R, X] the
    rows are written there, and its other rows keep their values.
    """
    return _spread(tokens, None, place, ends, num_rows, into)[0]


def spread_rows8(
    tokens: Values8, place: Tensor, ends: Tensor, num_rows: int | None = None
) -> Values8:
    """Do what `spread_rows` does, for tokens in e4m3 with their scales."""
    return type(tokens)(*_spread(tokens.data, tokens.scale, place, ends, num_rows))


@jit
def _sum_kernel(
    rows, place, ends, out, num_experts, WIDTH,
    ADD: tl.constexpr, CHOICES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    last = tl.load(ends + num_experts - 1)
    token = tl.program_id(0).to(tl.int64)
    if ADD:  # noqa: SIM102
        if _first_row(place, token, last, CHOICES) >= last:
            return
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    if ADD:
        total += tl.load(out + token * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    for choice in tl.static_range(CHOICES):
        row = tl.load(place + token * CHOICES + choice).to(tl.int64)
        values = tl.load(rows + row * WIDTH + column, mask=inside & (row < last), other=0.0)
        total += values.to(tl.float32)
    tl.store(out + token * WIDTH + column, total.to(out.dtype.element_ty), mask=inside)


def sum_rows(rows: Tensor, place: Tensor, ends: Tensor, into: Tensor | None = None) -> Tensor:
    """Return for each token the sum of its rows of `rows` [R, X]: [N, X] in their dtype.

    Sums are taken in fp32; absent choices add nothing. With `into` [N, X], contiguous, they are
    added to it, and it is returned; of a token without a row nothing is read or written there.
    """
    (num_tokens, choices), width = place.shape, rows.shape[1]
    out = rows.new_empty(num_tokens, width) if into is None else into
    if out.numel():
        block = min(1024, next_power_of_2(width))
        grid = (num_tokens, cdiv(width, block))
        _sum_kernel[grid](
            *(rows.contiguous(), place, ends, out, ends.shape[0], width),
            ADD=into is not None,
            CHOICES=choices,
            BLOCK=block,
        )
    return out


@jit
def _sum_pieces_kernel(out, a, b, c, d, e, f, g, h, size, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.load(a + at, mask=inside).to(tl.float32)
    total += tl.load(b + at, mask=inside).to(tl.float32)
    if COUNT > 2:
        total += tl.load(c + at, mask=inside).to(tl.float32)
    if COUNT > 3:
        total += tl.load(d + at, mask=inside).to(tl.float32)
    if COUNT > 4:
        total += tl.load(e + at, mask=inside).to(tl.float32)
    if COUNT > 5:
        total += tl.load(f + at, mask=inside).to(tl.float32)
    if COUNT > 6:
        total += tl.load(g + at, mask=inside).to(tl.float32)
    if COUNT > 7:
        total += tl.load(h + at, mask=inside).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


def sum_pieces(pieces: list[Tensor]) -> Tensor:
    """Return the sum of two or more `pieces` [N, X], added in order in fp32: [N, X]."""
    pieces = [piece.contiguous() for piece in pieces]
    out = torch.empty_like(pieces[0])
    while len(pieces) > 1 and out.numel():
        now, later = pieces[:8], pieces[8:]
        summed = torch.empty_like(out, dtype=torch.float32) if later else out
        unused = [now[0]] * (8 - len(now))
        _sum_pieces_kernel[(cdiv(out.numel(), 4096),)](
            *(summed, *now, *unused, out.numel()), COUNT=len(now), BLOCK=4096, num_warps=8
        )
        pieces = [summed, *later]
    return out
