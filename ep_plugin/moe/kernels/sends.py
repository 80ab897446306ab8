"""Who sends which rows to whom, and what a rank takes of them: few launches for many small steps.

Tokens are cut into blocks. Each block counts what it sends to each rank; a scan makes of that what
all blocks before it send; once the ranks know each other's counts, each block places its rows. See
`sends_torch` for what is counted and how rows lie.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ep_plugin.moe.kernels._launch import cdiv, jit, next_power_of_2

BLOCK = 64  # tokens


@triton.jit
def _hosted(
    expert_ids, token, rank, num_tokens, experts, etp_size,
    CHOICES: tl.constexpr, BLOCK: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """Return [BLOCK, RANKS] int32: how many choices of each token each rank hosts."""
    hosted = tl.zeros((BLOCK, RANKS), dtype=tl.int32)
    for choice in tl.static_range(CHOICES):
        at = expert_ids + token * CHOICES + choice
        expert = tl.load(at, mask=token < num_tokens, other=-1).to(tl.int32)
        host = tl.where(expert < 0, -1, expert // experts)
        hosted += (host[:, None] == (rank // etp_size)[None, :]).to(tl.int32)
    return hosted


@jit
def _count_sends_kernel(
    expert_ids, counts, num_tokens, num_ranks, experts, etp_size,
    CHOICES: tl.constexpr, BLOCK: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    block, rank = tl.program_id(0), tl.arange(0, RANKS)
    token = block * BLOCK + tl.arange(0, BLOCK)
    sizes = num_tokens, experts, etp_size
    hosted = _hosted(expert_ids, token, rank, *sizes, CHOICES, BLOCK, RANKS)
    cell = counts + block * 2 * num_ranks + rank
    tl.store(cell, tl.sum((hosted > 0).to(tl.int32), axis=0), mask=rank < num_ranks)
    tl.store(cell + num_ranks, tl.sum(hosted, axis=0), mask=rank < num_ranks)


@jit
def _scan_sends_kernel(counts, own, num_blocks, num_tokens, num_ranks, BLOCKS: tl.constexpr):
    """Replace the rows sent to one rank by those of the blocks before; write their totals."""
    rank, block = tl.program_id(0), tl.arange(0, BLOCKS)
    cell = counts + block * 2 * num_ranks + rank
    rows = tl.load(cell, mask=block < num_blocks, other=0)
    choices = tl.load(cell + num_ranks, mask=block < num_blocks, other=0)
    tl.store(cell, tl.cumsum(rows, axis=0) - rows, mask=block < num_blocks)
    tl.store(own + rank, tl.sum(rows, axis=0))
    tl.store(own + num_ranks + rank, tl.sum(choices, axis=0))
    tl.store(own + 2 * num_ranks + rank, num_tokens)


@jit
def _place_sends_kernel(
    expert_ids, before, table, place, numbers, num_tokens, num_ranks, own_rank, experts, etp_size,
    CHOICES: tl.constexpr, BLOCK: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    block, rank = tl.program_id(0), tl.arange(0, RANKS)
    token = block * BLOCK + tl.arange(0, BLOCK)
    known = rank < num_ranks
    of_source = table + rank * 3 * num_ranks
    inside = known[:, None] & known[None, :]
    rows = tl.load(of_source[:, None] + rank[None, :], mask=inside, other=0)  # [from, to]
    start = tl.sum(tl.where((rank < own_rank)[:, None], rows, 0), axis=0).to(tl.int32)
    start += tl.load(before + block * 2 * num_ranks + rank, mask=known, other=0)
    sizes = num_tokens, experts, etp_size
    sent = _hosted(expert_ids, token, rank, *sizes, CHOICES, BLOCK, RANKS) > 0
    row = start[None, :] + tl.cumsum(sent.to(tl.int32), axis=0) - 1
    cell = place + token[:, None] * num_ranks + rank[None, :]
    tl.store(cell, tl.where(sent, row, -1), mask=(token < num_tokens)[:, None] & known[None, :])
    if block == 0:
        came = tl.load(of_source + own_rank, mask=known, other=0)
        choices = tl.load(of_source + num_ranks + own_rank, mask=known, other=0)
        tokens = tl.load(of_source + 2 * num_ranks, mask=known, other=0)
        tl.store(numbers, tl.sum(came, axis=0))
        tl.store(numbers + 1, tl.sum(choices, axis=0))
        tl.store(numbers + 2, tl.max(tokens, axis=0))
        tl.store(numbers + 3, tl.max(tl.sum(rows, axis=0), axis=0))


def count_sends(
    expert_ids: Tensor, experts: int, ep_size: int, etp_size: int
) -> tuple[Tensor, Tensor]:
    """Return `own` [3, G] int64, of the choices `expert_ids` [T, K], and what `place_sends` takes.

    `own` is the rows sent to each rank, the choices that each hosts, and T in all columns. The
    other result is [blocks, 2, G] int32: rows that earlier blocks send, choices of this block.
    """
    (num_tokens, choices), ranks = expert_ids.shape, ep_size * etp_size
    num_blocks = cdiv(max(1, num_tokens), BLOCK)
    own = torch.empty(3, ranks, dtype=torch.int64, device=expert_ids.device)
    counts = own.new_empty(num_blocks, 2, ranks, dtype=torch.int32)
    _count_sends_kernel[(num_blocks,)](
        *(expert_ids.contiguous(), counts, num_tokens, ranks, experts, etp_size),
        CHOICES=choices,
        BLOCK=BLOCK,
        RANKS=next_power_of_2(ranks),
    )
    _scan_sends_kernel[(ranks,)](
        *(counts, own, num_blocks, num_tokens, ranks), BLOCKS=next_power_of_2(num_blocks)
    )
    return own, counts


def place_sends(
    expert_ids: Tensor,
    before: Tensor,
    table: Tensor,
    rank: int,
    experts: int,
    ep_size: int,
    etp_size: int,
) -> tuple[Tensor, Tensor]:
    """Return `place` [T, G] int32, each token's row on each rank, -1 = not sent; and `numbers`.

    `before` is of `count_sends`, `table` [G, 3, G] int64 the counts `own` of all ranks; this one is
    `rank`. `numbers` [4] int64 are the rows that come here, the choices that this rank hosts, the
    most tokens of a rank, and the most rows that come to a rank.
    """
    (num_tokens, choices), ranks = expert_ids.shape, ep_size * etp_size
    place = before.new_empty(num_tokens, ranks)
    numbers = table.new_empty(4)
    _place_sends_kernel[(before.shape[0],)](
        *(expert_ids.contiguous(), before, table.contiguous(), place, numbers),
        *(num_tokens, ranks, rank, experts, etp_size),
        CHOICES=choices,
        BLOCK=BLOCK,
        RANKS=next_power_of_2(ranks),
    )
    return place, numbers


@jit
def _take_own_kernel(
    chosen, probs, came, ids, kept, counts, num_choices, first, num_experts,
    CHOICES: tl.constexpr, BOUNDED: tl.constexpr, BLOCK: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    choice = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = choice < num_choices
    local = tl.load(chosen + choice, mask=inside, other=-1) - first
    here = inside & (local >= 0) & (local < num_experts)
    if BOUNDED:
        here = here & (choice // CHOICES < tl.load(came))
    local = tl.where(here, local, -1)
    tl.store(ids + choice, local, mask=inside)
    tl.store(kept + choice, tl.load(probs + choice, mask=here, other=0), mask=inside)
    column = tl.arange(0, E)
    hits = tl.sum((local.to(tl.int32)[:, None] == column[None, :]).to(tl.int64), axis=0)
    tl.atomic_add(counts + column, hits, mask=(column < num_experts) & (hits > 0))


def take_own(
    chosen: Tensor, probs: Tensor, came: Tensor | None, first: int, experts: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return local ids [N, K], -1 = not here; probabilities [N, K], 0 there; counts [e] int64.

    `chosen` [N, K] int64 are expert ids; the e = `experts` from `first` on are here. With `came` []
    int64 rows from that one on are nobody's, whatever they hold. `probs` keep their dtype.
    """
    ids, kept = chosen.new_empty(chosen.shape), probs.new_empty(probs.shape)
    counts = torch.zeros(experts, dtype=torch.int64, device=chosen.device)
    if chosen.numel():
        buckets = next_power_of_2(experts)
        block = max(16, min(512, 8192 // buckets))
        _take_own_kernel[(cdiv(chosen.numel(), block),)](
            *(chosen.contiguous(), probs.contiguous(), counts if came is None else came),
            *(ids, kept, counts, chosen.numel(), first, experts),
            CHOICES=chosen.shape[1],
            BOUNDED=came is not None,
            BLOCK=block,
            E=buckets,
        )
    return ids, kept, counts


@jit
def _zero_absent_kernel(values, expert_ids, kept, num_choices, BLOCK: tl.constexpr):
    choice = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = choice < num_choices
    there = tl.load(expert_ids + choice, mask=inside, other=-1) >= 0
    tl.store(kept + choice, tl.load(values + choice, mask=there, other=0), mask=inside)


def zero_absent(values: Tensor, expert_ids: Tensor) -> Tensor:
    """Return `values` [N, K], with 0 where `expert_ids` [N, K] is negative."""
    kept = values.new_empty(values.shape)
    if kept.numel():
        _zero_absent_kernel[(cdiv(kept.numel(), 1024),)](
            *(values.contiguous(), expert_ids.contiguous(), kept, kept.numel()), BLOCK=1024
        )
    return kept
