"""The Triton code of `kernels.route`: choose experts, add up sums, drop choices; the backward.

T tokens, E experts, K choices of a token. In the kernels E is the next power of two, EXPERTS the
number itself.
"""

import torch
import triton
import triton.language as tl

from ep_plugin.moe.kernels._launch import jit
from ep_plugin.moe.kernels.capacity import RANDOM, place_of, queue_key, serve

TINY = tl.constexpr(torch.finfo(torch.float32).tiny)  # divisors are at least this
NOBODY = tl.constexpr(-(2**31))  # less than `_ordered` of any logit
# Rows [E] int64 of the counts, in one matrix as each argument of a launch costs the host time: the
# choices; those that the balancing loss counts, if they are others; those with room; in the first
# number of a row the programs that have finished; and from there on the lengths of queues.
CHOSEN, OTHERS, SENT, ARRIVED, QUEUES = map(tl.constexpr, range(5))


@triton.jit
def _best(values):
    """Return the largest value of each row and its column; of equal values the first column."""
    return tl.max(values, axis=1, return_indices=True, return_indices_tie_break_left=True)


@triton.jit
def _ordered(value):
    """Map fp32 to int32 in the same order: NaN is below minus infinity, and +0 equals -0."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(value == value, ordered, NOBODY + 1)


@triton.jit
def _number(ordered):
    """Map the result of `_ordered` back to fp32."""
    bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    return bits.to(tl.float32, bitcast=True)


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


@jit
def route_kernel(
    logits, bias, draws, ids, sent_ids, weights, per_token, counts, partials, keys,
    num_tokens, num_sequences, EXPERTS, TILES, room, place_bits,
    K: tl.constexpr, SIGMOID: tl.constexpr, BIASED: tl.constexpr, NORMALIZE: tl.constexpr,
    COUNT_TOP1: tl.constexpr, COUNT_PLAIN: tl.constexpr, POLICY: tl.constexpr,
    NUM_GROUPS: tl.constexpr, GROUP_TOPK: tl.constexpr, EACH: tl.constexpr,
    BLOCK: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    totals, normalizers = per_token, per_token + num_tokens
    counted = counts
    if COUNT_TOP1 or COUNT_PLAIN:
        counted = counts + OTHERS * EXPERTS
    waiting = counts + QUEUES * EXPERTS
    expert = tl.arange(0, E)
    inside = expert < EXPERTS
    column = tl.broadcast_to(expert[None, :], (BLOCK, E))
    sums = tl.zeros((E,), tl.float32)
    squares = tl.zeros((BLOCK,), tl.float32)
    entropies = tl.zeros((BLOCK,), tl.float32)
    confidences = tl.zeros((BLOCK,), tl.float32)
    chosen_here = tl.zeros((E,), tl.int32)
    counted_here = tl.zeros((E,), tl.int32)
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
            tl.store(normalizers + token, whole, mask=real)
        else:
            score = exponential / total[:, None]
            part = score
        tl.store(totals + token, lse, mask=real)
        sums += tl.sum(part, axis=0)
        squares += tl.where(real, lse * lse, 0.0)
        entropies -= tl.sum(part * tl.log(tl.where(part > 0, part, 1.0)), axis=1)

        ranking = logit  # in the order of scores, but without ties where scores saturate
        if BIASED or NUM_GROUPS > 0:
            ranking = score
            if BIASED:
                ranking += tl.load(bias + expert, mask=inside, other=0.0)[None, :]
            if NUM_GROUPS > 0:
                ranking = tl.where(ranking == ranking, ranking, -1.0e30)
                ranking = _inside_best_groups(ranking, BLOCK, E, NUM_GROUPS, GROUP_TOPK, EACH)
        # A chosen expert's entry becomes NOBODY, so that no token chooses an expert twice.
        order = tl.where(inside[None, :], _ordered(ranking), NOBODY)
        wheres = ()
        values = ()
        together = tl.zeros((BLOCK,), tl.float32)
        first_value = together
        for k in tl.static_range(K):
            largest = tl.max(order, axis=1)
            where = tl.min(tl.where(order == largest[:, None], column, E), axis=1)
            mine = column == where[:, None]
            order = tl.where(mine, NOBODY, order)
            if BIASED or NUM_GROUPS > 0:
                value = tl.sum(tl.where(mine, score, 0.0), axis=1)
            elif SIGMOID:
                value = tl.sigmoid(_number(largest))
            else:
                value = tl.exp(_number(largest) - lse)
            value = tl.where(lse == lse, value, lse)  # NaN if a logit of the token is NaN
            wheres = wheres + (where,)  # type: ignore[assignment]  # noqa: RUF005
            values = values + (value,)  # type: ignore[assignment]  # noqa: RUF005
            together += value
            if k == 0:
                first_value = value
            if k == 0 and COUNT_TOP1 and not COUNT_PLAIN:
                counted_here += tl.sum((mine & there).to(tl.int32), axis=0)
        chosen_here += tl.sum(((order == NOBODY) & there).to(tl.int32), axis=0)
        if BIASED or NUM_GROUPS > 0:
            confidences += tl.where(real, tl.max(score, axis=1), 0.0)
        else:
            confidences += tl.where(real, first_value, 0.0)
        divisor = tl.where(real, 1.0, 1.0)
        if NORMALIZE:
            divisor = tl.maximum(together, TINY)
        for k in tl.static_range(K):
            at = token.to(tl.int64) * K + k
            weight = values[k] / divisor
            tl.store(ids + at, wheres[k].to(tl.int64), mask=real)
            tl.store(weights + at, weight, mask=real)
            if POLICY > 0:
                tl.store(sent_ids + at, wheres[k].to(tl.int64), mask=real)
        if POLICY > 0:
            place = place_of(token, num_tokens, num_sequences)
            first_queue = place // room * EXPERTS
            slots = ()
            for k in tl.static_range(K):  # all slots are requested before the first is used
                at = waiting + first_queue + wheres[k]
                slot = tl.atomic_add(at, 1, mask=real, sem="relaxed")
                slots = slots + (slot,)  # type: ignore[assignment]  # noqa: RUF005
            for k in tl.static_range(K):
                weight = values[k] / divisor
                draw = weight
                if POLICY == RANDOM:
                    at = token.to(tl.int64) * K + k
                    draw = tl.load(draws + at, mask=real, other=0.0)
                key = queue_key(place, k, weight, first_value, draw, place_bits, POLICY)
                queue = (first_queue + wheres[k]).to(tl.int64)
                at = keys + queue * room + slots[k]
                tl.store(at, key, mask=real)
        if COUNT_PLAIN:
            left = tl.where(inside[None, :], _ordered(score), NOBODY)
            for k in tl.static_range(K):
                if k == 0 or not COUNT_TOP1:
                    largest = tl.max(left, axis=1)
                    where = tl.min(tl.where(left == largest[:, None], column, E), axis=1)
                    left = tl.where(column == where[:, None], NOBODY, left)
            counted_here += tl.sum(((left == NOBODY) & there).to(tl.int32), axis=0)
    row = partials + tl.program_id(0).to(tl.int64) * (EXPERTS + 3)
    tl.store(row + expert, sums, mask=inside)
    tl.store(row + EXPERTS, tl.sum(squares))
    tl.store(row + EXPERTS + 1, tl.sum(entropies))
    tl.store(row + EXPERTS + 2, tl.sum(confidences))
    there = inside & (chosen_here > 0)
    tl.atomic_add(counts + expert, chosen_here.to(tl.int64), mask=there, sem="relaxed")
    if COUNT_TOP1 or COUNT_PLAIN:
        there = inside & (counted_here > 0)
        tl.atomic_add(counted + expert, counted_here.to(tl.int64), mask=there, sem="relaxed")


@jit
def finish_kernel(
    partials, counts, sums, balancing_loss, z_loss, keys, sent_ids, weights, num_rows, num_tokens,
    num_sequences, EXPERTS, ADDERS, GROUPS, room, limit, last_limit, place_bits, key_bits,
    K: tl.constexpr, COLUMNS: tl.constexpr, ADDED: tl.constexpr, E: tl.constexpr,
    SERVED: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    """Add up the partial sums of `route_kernel`, and serve the queues of experts.

    The first ADDERS programs add COLUMNS columns each, in a fixed order. The last of them to finish
    computes this rank's balancing loss and z-loss. Each program after those serves one queue.
    """
    if tl.program_id(0) >= ADDERS:
        serve(
            tl.program_id(0) - ADDERS, keys, counts + QUEUES * EXPERTS, sent_ids, weights,
            counts + SENT * EXPERTS, num_tokens, num_sequences, EXPERTS, GROUPS, room, limit,
            last_limit, place_bits, key_bits, K, SERVED,
        )  # fmt: skip
        return
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < EXPERTS + 3
    total = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, num_rows, ADDED):
        row = start + tl.arange(0, ADDED)
        at = partials + row.to(tl.int64)[:, None] * (EXPERTS + 3) + column[None, :]
        there = (row < num_rows)[:, None] & inside[None, :]
        total += tl.sum(tl.load(at, mask=there, other=0.0), axis=0)
    tl.store(sums + column, total, mask=inside)
    tl.debug_barrier()  # all sums of this program are stored before it counts as finished
    if tl.atomic_add(counts + ARRIVED * EXPERTS, 1) == ADDERS - 1:
        expert = tl.arange(0, E)
        exists = expert < EXPERTS
        number = tl.load(counts + COUNTED * EXPERTS + expert, mask=exists, other=0)
        number = number.to(tl.float32)
        score = tl.load(sums + expert, mask=exists, other=0.0)
        choices = tl.maximum(tl.sum(number), 1.0)
        tl.store(balancing_loss, tl.sum(number * score) * EXPERTS / choices / num_tokens)
        tl.store(z_loss, tl.load(sums + EXPERTS) / num_tokens)


@jit
def route_backward_kernel(
    logits, ids, sent_ids, counted, per_token, d_weights, d_sums, d_balancing, d_z, d_logits,
    num_tokens, EXPERTS,
    K: tl.constexpr, SIGMOID: tl.constexpr, NORMALIZE: tl.constexpr, SUMS: tl.constexpr,
    BALANCING: tl.constexpr, Z: tl.constexpr, BLOCK: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    totals, normalizers = per_token, per_token + num_tokens
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
    # Gradient of each score that comes through the weights of chosen experts.
    chosen_sum = tl.zeros((BLOCK,), tl.float32)
    inner = tl.zeros((BLOCK,), tl.float32)
    direct = tl.zeros((BLOCK, E), tl.float32)
    chosen = tl.zeros((BLOCK, E), tl.float32)
    for k in tl.static_range(K):
        at = token.to(tl.int64) * K + k
        mine = tl.load(ids + at, mask=real, other=-1)[:, None] == expert[None, :]
        sent = tl.load(sent_ids + at, mask=real, other=-1) >= 0  # dropped choices have weight 0
        grad = tl.load(d_weights + at, mask=sent, other=0.0)
        value = tl.sum(tl.where(mine, score, 0.0), axis=1)
        chosen_sum += value
        inner += grad * value
        direct += tl.where(mine, grad[:, None], 0.0)
        chosen += tl.where(mine, 1.0, 0.0)
    if NORMALIZE:
        by = tl.maximum(chosen_sum, TINY)[:, None]
        direct = direct / by - chosen * (inner[:, None] / by) / by
    # Gradient that comes through the sums of scores over tokens (normalised scores with sigmoid).
    of_sums = tl.zeros((E,), tl.float32)
    of_z = 0.0
    if SUMS:
        of_sums += tl.load(d_sums + expert, mask=expert < EXPERTS, other=0.0)
        of_z += tl.load(d_sums + EXPERTS)
    if BALANCING:
        number = tl.load(counted + expert, mask=expert < EXPERTS, other=0).to(tl.float32)
        share = EXPERTS / tl.maximum(tl.sum(number), 1.0) / num_tokens
        of_sums += tl.load(d_balancing) * share * number
    if Z:
        of_z += tl.load(d_z) / num_tokens
    of_sums = of_sums[None, :]
    if SIGMOID:
        whole = tl.load(normalizers + token, mask=real, other=1.0)[:, None]
        mean = tl.sum(score / whole * of_sums, axis=1)[:, None]
        direct += (of_sums - mean) / whole
        result = direct * score * (1.0 - score)
    else:
        direct += of_sums
        result = score * (direct - tl.sum(score * direct, axis=1)[:, None])
    result += of_z * 2.0 * lse[:, None] * probability
    tl.store(d_logits + cell, result, mask=there)
