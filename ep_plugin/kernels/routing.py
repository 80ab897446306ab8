"""From logits to choices in one pass, and its backward in another.

The plain-torch twin is `router._choose.PlainChoice`, over all tokens of the rank. One program holds
a block of tokens with all their experts in registers: scores, the K best (of equal ones the lower
expert), their weights, and what losses and metrics sum over tokens. Sums over tokens are added in a
fixed order, so repeats are equal to the bit; counts are integers.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ep_plugin.config import RoutingConfig

MAX_EXPERTS, MAX_TOPK = 1024, 16
PROGRAMS = 264  # two for each multiprocessor; each leaves one row of sums
HELD = 2048  # logits in a program's registers
WARPS = 8  # of a program
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)  # divisors are at least this
ADDED, ADDERS = 32768, 4  # sums read at a time by the program that adds them up, and its warps


@triton.jit
def _best(values):
    """Return the largest value of each row and its column, the lowest of equal ones."""
    return tl.max(values, axis=1, return_indices=True, return_indices_tie_break_left=True)


@triton.jit
def _inside_best_groups(
    ranking, BLOCK: tl.constexpr, E: tl.constexpr,
    NUM_GROUPS: tl.constexpr, GROUP_TOPK: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    SIZE: tl.constexpr = E // NUM_GROUPS
    grouped = tl.reshape(ranking, (BLOCK, NUM_GROUPS, SIZE))
    inside = tl.broadcast_to(tl.arange(0, SIZE)[None, None, :], (BLOCK, NUM_GROUPS, SIZE))
    left = grouped
    score = tl.zeros((BLOCK, NUM_GROUPS), tl.float32)
    for _ in tl.static_range(EACH):
        largest = tl.max(left, axis=2)
        score += largest
        where = tl.min(tl.where(left == largest[:, :, None], inside, SIZE), axis=2)
        left = tl.where(inside == where[:, :, None], float("-inf"), left)
    group = tl.broadcast_to(tl.arange(0, NUM_GROUPS)[None, :], (BLOCK, NUM_GROUPS))
    chosen = tl.zeros((BLOCK, NUM_GROUPS), tl.int32)
    for _ in tl.static_range(GROUP_TOPK):
        _, where = _best(score)
        chosen = tl.where(group == where[:, None], 1, chosen)
        score = tl.where(group == where[:, None], float("-inf"), score)
    kept = tl.where(chosen[:, :, None] > 0, grouped, float("-inf"))
    return tl.reshape(kept, (BLOCK, E))


@triton.jit
def _route_kernel(
    logits, bias, ids, weights, totals, normalizers, counts, partials, num_tokens, EXPERTS, TILES,
    K: tl.constexpr, SIGMOID: tl.constexpr, BIASED: tl.constexpr, NORMALIZE: tl.constexpr,
    COUNT_TOP1: tl.constexpr, COUNT_PLAIN: tl.constexpr,
    NUM_GROUPS: tl.constexpr, GROUP_TOPK: tl.constexpr, EACH: tl.constexpr,
    BLOCK: tl.constexpr, E: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    expert = tl.arange(0, E)
    inside = expert < EXPERTS
    column = tl.broadcast_to(expert[None, :], (BLOCK, E))
    choice = tl.arange(0, KEPT)
    sums = tl.zeros((E,), tl.float32)
    squares = tl.zeros((BLOCK,), tl.float32)
    entropies = tl.zeros((BLOCK,), tl.float32)
    confidences = tl.zeros((BLOCK,), tl.float32)
    sent = tl.zeros((E,), tl.int32)
    counted = tl.zeros((E,), tl.int32)
    for tile in range(TILES):
        token = (tl.program_id(0) * TILES + tile) * BLOCK + tl.arange(0, BLOCK)
        real = token < num_tokens
        there = real[:, None] & inside[None, :]
        cell = token.to(tl.int64)[:, None] * EXPERTS + expert[None, :]
        logit = tl.load(logits + cell, mask=there, other=float("-inf"))
        top = tl.where(real, tl.max(logit, axis=1), 0.0)
        exponential = tl.where(there, tl.exp(logit - top[:, None]), 0.0)
        total = tl.where(real, tl.sum(exponential, axis=1), 1.0)
        lse = top + tl.log(total)
        if SIGMOID:
            score = tl.where(there, tl.sigmoid(logit), 0.0)
            whole = tl.where(real, tl.maximum(tl.sum(score, axis=1), TINY), 1.0)
            part = score / whole[:, None]
        else:
            score = exponential / total[:, None]
            whole = tl.where(real, 1.0, 1.0)
            part = score
        tl.store(totals + token, lse, mask=real)
        tl.store(normalizers + token, whole, mask=real)
        sums += tl.sum(part, axis=0)
        squares += tl.where(real, lse * lse, 0.0)
        entropies -= tl.sum(part * tl.log(tl.where(part > 0, part, 1.0)), axis=1)

        ranking = logit  # the same order as scores, and no ties where they saturate
        if BIASED or NUM_GROUPS > 0:
            ranking = score
            if BIASED:
                ranking += tl.load(bias + expert, mask=inside, other=0.0)[None, :]
            if NUM_GROUPS > 0:
                ranking = tl.where(ranking == ranking, ranking, -1.0e30)
                ranking = _inside_best_groups(ranking, BLOCK, E, NUM_GROUPS, GROUP_TOPK, EACH)
            ranking = tl.where(inside[None, :], ranking, float("-inf"))
        # What is chosen goes to minus infinity: nothing else may be there, or be NaN, lest a token
        # has an expert twice.
        lowest = tl.where(inside, -3.0e38, float("-inf"))[None, :]
        ranking = tl.where(ranking > -3.0e38, ranking, lowest)
        chosen = tl.zeros((BLOCK, E), tl.int32)
        values = tl.zeros((BLOCK, KEPT), tl.float32)
        for k in tl.static_range(K):
            largest, where = _best(ranking)
            mine = column == where[:, None]
            ranking = tl.where(mine, float("-inf"), ranking)
            chosen = tl.where(mine & there, 1, chosen)
            if BIASED:
                value = tl.sum(tl.where(mine, score, 0.0), axis=1)
            elif NUM_GROUPS > 0:
                value = largest
            elif SIGMOID:
                value = tl.sigmoid(largest)
            else:
                value = tl.exp(largest - lse)
            value = tl.where(lse == lse, value, lse)  # NaN where a logit of the token is
            values = tl.where(choice[None, :] == k, value[:, None], values)
            tl.store(ids + token.to(tl.int64) * K + k, where.to(tl.int64), mask=real)
            if k == 0:
                if COUNT_TOP1 and not COUNT_PLAIN:
                    counted += tl.sum(chosen, axis=0)
                if not BIASED and NUM_GROUPS == 0:
                    confidences += tl.where(real, value, 0.0)
        if BIASED or NUM_GROUPS > 0:
            confidences += tl.where(real, tl.max(score, axis=1), 0.0)
        sent += tl.sum(chosen, axis=0)
        if NORMALIZE:
            values = values / tl.maximum(tl.sum(values, axis=1), TINY)[:, None]
        at = weights + token.to(tl.int64)[:, None] * K + choice[None, :]
        tl.store(at, values, mask=real[:, None] & (choice < K)[None, :])
        if COUNT_PLAIN:
            left = tl.where(there & (score == score), score, float("-inf"))
            for k in tl.static_range(K):
                if k == 0 or not COUNT_TOP1:
                    _, where = _best(left)
                    mine = column == where[:, None]
                    left = tl.where(mine, float("-inf"), left)
                    counted += tl.sum(tl.where(mine & there, 1, 0), axis=0)
    if not COUNT_TOP1 and not COUNT_PLAIN:
        counted = sent
    row = partials + tl.program_id(0).to(tl.int64) * (EXPERTS + 3)
    tl.store(row + expert, sums, mask=inside)
    tl.store(row + EXPERTS, tl.sum(squares))
    tl.store(row + EXPERTS + 1, tl.sum(entropies))
    tl.store(row + EXPERTS + 2, tl.sum(confidences))
    tl.atomic_add(counts + expert, sent.to(tl.int64), mask=inside)
    tl.atomic_add(counts + EXPERTS + expert, counted.to(tl.int64), mask=inside)


@triton.jit
def _finish_kernel(
    partials, counts, sums, losses, num_blocks, num_tokens, EXPERTS, BLOCK: tl.constexpr,
    E: tl.constexpr,
):  # fmt: skip
    """Add the blocks' sums in order; one program. Losses: balancing, z, of this rank's tokens."""
    column = tl.arange(0, E)
    inside = column < EXPERTS + 3
    total = tl.zeros((E,), tl.float32)
    for start in range(0, num_blocks, BLOCK):
        block = start + tl.arange(0, BLOCK)
        there = (block < num_blocks)[:, None] & inside[None, :]
        at = partials + block.to(tl.int64)[:, None] * (EXPERTS + 3) + column[None, :]
        total += tl.sum(tl.load(at, mask=there, other=0.0), axis=0)
    tl.store(sums + column, total, mask=inside)
    counted = tl.load(counts + EXPERTS + column, mask=column < EXPERTS, other=0).to(tl.float32)
    choices = tl.maximum(tl.sum(counted), 1.0)
    balancing = tl.sum(counted * total) * EXPERTS / choices / num_tokens
    tl.store(losses, balancing)
    tl.store(losses + 1, tl.sum(tl.where(column == EXPERTS, total, 0.0)) / num_tokens)


@triton.jit
def _route_backward_kernel(
    logits, ids, counts, totals, normalizers, d_weights, d_sums, d_losses, d_logits, num_tokens,
    EXPERTS,
    K: tl.constexpr, SIGMOID: tl.constexpr, NORMALIZE: tl.constexpr,
    BLOCK: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.arange(0, E)
    real = token < num_tokens
    there = real[:, None] & (expert < EXPERTS)[None, :]
    cell = token.to(tl.int64)[:, None] * EXPERTS + expert[None, :]
    logit = tl.load(logits + cell, mask=there, other=float("-inf"))
    lse = tl.load(totals + token, mask=real, other=0.0)
    probability = tl.where(there, tl.exp(logit - lse[:, None]), 0.0)
    score = probability
    if SIGMOID:
        score = tl.where(there, tl.sigmoid(logit), 0.0)
    # Gradient of each score, through the chosen weights.
    chosen_sum = tl.zeros((BLOCK,), tl.float32)
    inner = tl.zeros((BLOCK,), tl.float32)
    direct = tl.zeros((BLOCK, E), tl.float32)
    chosen = tl.zeros((BLOCK, E), tl.float32)
    for k in tl.static_range(K):
        at = token.to(tl.int64) * K + k
        mine = tl.load(ids + at, mask=real, other=-1)[:, None] == expert[None, :]
        grad = tl.load(d_weights + at, mask=real, other=0.0)
        value = tl.sum(tl.where(mine, score, 0.0), axis=1)
        chosen_sum += value
        inner += grad * value
        direct += tl.where(mine, grad[:, None], 0.0)
        chosen += tl.where(mine, 1.0, 0.0)
    if NORMALIZE:
        by = tl.maximum(chosen_sum, TINY)[:, None]
        direct = direct / by - chosen * (inner[:, None] / by) / by
    # Through the sums over tokens of scores (of their parts of 1, with sigmoid).
    of_sums = tl.load(d_sums + expert, mask=expert < EXPERTS, other=0.0)
    counted = tl.load(counts + EXPERTS + expert, mask=expert < EXPERTS, other=0).to(tl.float32)
    share = EXPERTS / tl.maximum(tl.sum(counted), 1.0) / num_tokens
    of_sums = (of_sums + tl.load(d_losses) * share * counted)[None, :]
    if SIGMOID:
        whole = tl.load(normalizers + token, mask=real, other=1.0)[:, None]
        mean = tl.sum(score / whole * of_sums, axis=1)[:, None]
        direct += (of_sums - mean) / whole
        result = direct * score * (1.0 - score)
    else:
        direct += of_sums
        result = score * (direct - tl.sum(score * direct, axis=1)[:, None])
    d_z = tl.load(d_sums + EXPERTS) + tl.load(d_losses + 1) / num_tokens
    result += d_z * 2.0 * lse[:, None] * probability
    tl.store(d_logits + cell, result, mask=there)


@dataclass(frozen=True)
class Routed:
    """What `route` returns; the losses, `weights`, `score_sums` and `z_sum` have gradients."""

    expert_ids: Tensor  # [T, K] int64, best first
    weights: Tensor  # [T, K] fp32, divided by their sum when the setting is before_drop
    score_sums: Tensor  # [1, E] fp32, over tokens
    z_sum: Tensor  # [] fp32, sum over tokens of logsumexp^2
    sent: Tensor  # [E] int64, choices
    counted: Tensor  # [E] int64, the choices that the balancing loss counts
    entropy: Tensor  # [] fp32, summed over tokens
    confidence: Tensor  # [] fp32, sum over tokens of the largest score
    balancing_loss: Tensor  # [] fp32, over the tokens given
    z_loss: Tensor  # [] fp32, mean over the tokens given


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, bias: Tensor | None, routing: RoutingConfig
    ) -> tuple[Tensor, ...]:
        (num_tokens, experts), device = logits.shape, logits.device
        width = triton.next_power_of_2(experts)
        block = max(1, min(16, HELD // width))  # tokens held at a time, in few registers
        tiles = triton.cdiv(triton.cdiv(num_tokens, block), PROGRAMS)  # of each program
        num_blocks = triton.cdiv(num_tokens, block * max(tiles, 1))
        ids = torch.empty(num_tokens, routing.topk, dtype=torch.int64, device=device)
        weights = torch.empty(num_tokens, routing.topk, dtype=torch.float32, device=device)
        per_token = torch.empty(2, num_tokens, dtype=torch.float32, device=device)
        counts = torch.zeros(2, experts, dtype=torch.int64, device=device)
        partials = torch.empty(num_blocks, experts + 3, dtype=torch.float32, device=device)
        logits = logits.contiguous()
        settings = {
            "K": routing.topk,
            "SIGMOID": routing.score_function == "sigmoid",
            "NORMALIZE": routing.normalize == "before_drop",
            "BLOCK": block,
            "E": width,
        }
        if num_tokens:
            _route_kernel[(num_blocks,)](
                *(logits, counts if bias is None else bias, ids, weights, *per_token, counts),
                *(partials, num_tokens, experts, tiles),
                KEPT=triton.next_power_of_2(routing.topk),
                num_warps=WARPS,
                BIASED=bias is not None,
                COUNT_TOP1=routing.aux_loss_counts == "top1",
                COUNT_PLAIN=bias is not None or routing.num_groups is not None,
                NUM_GROUPS=routing.num_groups or 0,
                GROUP_TOPK=routing.group_topk or 1,
                EACH=routing.topk // (routing.group_topk or 1),
                **settings,
            )
        results = partials.new_empty if num_tokens else partials.new_zeros
        sums, losses = results(experts + 3), results(2)
        if num_tokens:
            _finish_kernel[(1,)](
                *(partials, counts, sums, losses, num_blocks, num_tokens, experts),
                BLOCK=max(1, ADDED // triton.next_power_of_2(experts + 3)),
                E=triton.next_power_of_2(experts + 3),
                num_warps=ADDERS,
            )
        ctx.save_for_backward(logits, ids, counts, per_token)
        ctx.settings = settings
        ctx.mark_non_differentiable(ids, counts)
        ctx.set_materialize_grads(False)
        return weights, sums, losses, ids, counts

    @staticmethod
    def backward(
        ctx: Any, d_weights: Tensor | None, d_sums: Tensor | None, d_losses: Tensor | None, *_: Any
    ) -> tuple[Tensor, None, None]:
        logits, ids, counts, per_token = ctx.saved_tensors
        (num_tokens, experts), d_logits = logits.shape, torch.empty_like(logits)
        if d_weights is None:
            d_weights = torch.zeros(ids.shape, dtype=torch.float32, device=logits.device)
        if d_sums is None:
            d_sums = torch.zeros(experts + 3, dtype=torch.float32, device=logits.device)
        if d_losses is None:
            d_losses = torch.zeros(2, dtype=torch.float32, device=logits.device)
        if num_tokens:
            _route_backward_kernel[(triton.cdiv(num_tokens, ctx.settings["BLOCK"]),)](
                *(logits, ids, counts, *per_token, d_weights.contiguous(), d_sums.contiguous()),
                *(d_losses.contiguous(), d_logits, num_tokens, experts),
                **ctx.settings,
            )
        return d_logits, None, None


def fits(logits: Tensor, routing: RoutingConfig, training: bool) -> bool:
    """Whether the kernel does this routing; the twin does all."""
    experts = logits.shape[1]
    whole_groups = routing.num_groups is None or (
        experts & (experts - 1) == 0 and routing.num_groups & (routing.num_groups - 1) == 0
    )
    return (
        logits.is_cuda
        and logits.dtype == torch.float32
        and experts <= MAX_EXPERTS
        and routing.topk <= MAX_TOPK
        and routing.second_expert == "all"
        and not (routing.noise != "none" and training)
        and routing.aux_loss_scope in ("micro_batch", "global")
        and whole_groups
    )


def route(logits: Tensor, routing: RoutingConfig, expert_bias: Tensor | None) -> Routed:
    """Return the choices for `logits` [T, E] fp32; see `fits`."""
    experts = logits.shape[1]
    weights, sums, losses, ids, counts = _Route.apply(logits, expert_bias, routing)
    return Routed(
        ids,
        weights,
        sums[:experts].unsqueeze(0),
        sums[experts],
        counts[0],
        counts[1],
        sums[experts + 1].detach(),
        sums[experts + 2].detach(),
        losses[0],
        losses[1],
    )
