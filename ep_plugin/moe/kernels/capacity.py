"""Capacity: the parts of the routing kernels that drop the choices an expert has no room for.

The plain-torch twin is `router._capacity.keep`. There is one queue for each expert in each routing
group. While tokens choose, each choice joins the queue of its expert. It brings an int64 key; lower
keys are served first, and no two keys of a queue are equal. So the order of arrival does not
matter:

    key = priority by the drop policy | place of the token in the rank's list | k (K_BITS bits)

Then each queue that is longer than the capacity is cut, independently of the others. The largest
key that still finds room is searched four bits at a time; choices with larger keys are dropped.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

POSITION, RANK_POSITION, PROBS = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
RANDOM, BPR = tl.constexpr(4), tl.constexpr(5)
POLICIES = {  # name -> its number (0 means no capacity), bits of the priority
    "position": (POSITION.value, 0),
    "rank_position": (RANK_POSITION.value, 4),
    "probs": (PROBS.value, 30),
    "random": (RANDOM.value, 30),
    "bpr": (BPR.value, 34),
}
K_BITS = tl.constexpr(4)  # of k in a key
SCORE_BITS = tl.constexpr(30)  # a score in [0, 1] as fp32 bits, which sort as the numbers do
ONE = tl.constexpr(0x3F800000)  # the bits of 1.0
MAX_TOKENS = 2**22  # so that a key has at most 60 bits
SERVED = 512  # choices that a program reads at a time


@dataclass(frozen=True)
class Capacity:
    """How many choices an expert takes from each routing group, and by which policy."""

    group_tokens: int  # tokens of a routing group
    limit: int  # choices an expert takes from a group
    last_limit: int  # the same for the last group, which may be shorter
    num_sequences: int  # of the rank's micro-batch
    policy: str  # one of POLICIES
    draws: Tensor | None  # [T, K] fp32 in [0, 1), for the policy random

    def num_groups(self, num_tokens: int) -> int:
        """Return the number of routing groups; each has a queue for every expert."""
        return -(-num_tokens // self.group_tokens)

    def rules(self, num_tokens: int) -> tuple[int, int, int, int, int, int]:
        """Return what the kernels read, for a rank with `num_tokens` tokens.

        That is num_sequences, group_tokens, limit, last_limit, bits of a place, bits of a key.
        """
        place = max(1, (num_tokens - 1).bit_length())
        bits = (place, place + POLICIES[self.policy][1] + 4)
        return self.num_sequences, self.group_tokens, self.limit, self.last_limit, *bits


@triton.jit
def place_of(token, num_tokens, num_sequences):
    """Return a token's index in a list sequence by sequence; see `place_by_sequence`."""
    return token % num_sequences * (num_tokens // num_sequences) + token // num_sequences


@triton.jit
def _descending(score):
    """Map a score in [0, 1] to 30 bits of an int64; larger scores come first, NaN comes last."""
    bits = tl.minimum(tl.maximum(score, 0.0), 1.0).to(tl.int32, bitcast=True)
    return tl.where(score == score, ONE - bits, ONE).to(tl.int64)


@triton.jit
def queue_key(place, k: tl.constexpr, weight, first_score, draw, place_bits, POLICY: tl.constexpr):
    """Return the key of the k-th choice of the tokens at `place`."""
    key = place.to(tl.int64)
    if POLICY == RANK_POSITION:
        key += (place * 0 + k).to(tl.int64) << place_bits
    if POLICY == PROBS:
        key += _descending(weight) << place_bits
    if POLICY == RANDOM:
        key += draw.to(tl.int32, bitcast=True).to(tl.int64) << place_bits
    if POLICY == BPR:
        key += _descending(first_score) << place_bits
        key += (place * 0 + k).to(tl.int64) << (place_bits + SCORE_BITS)
    return (key << K_BITS) + k


@triton.jit
def serve(
    queue, keys, waiting, ids, weights, sent, num_tokens, num_sequences, EXPERTS, GROUPS, room,
    limit, last_limit, place_bits, key_bits, K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Serve one queue: choices without room get id -1 and weight 0; the rest is added to `sent`."""
    length = tl.load(waiting + queue)
    limit = tl.where(queue >= (GROUPS - 1) * EXPERTS, last_limit, limit)
    tl.atomic_add(sent + queue % EXPERTS, tl.minimum(length, limit).to(tl.int64))
    if length > limit:
        mine = keys + queue.to(tl.int64) * room
        digit = tl.arange(0, 16).to(tl.int64)
        last = limit.to(tl.int64) * 0  # the largest key that finds room
        steps = (key_bits + 3) // 4
        for step in range(0, steps):
            shift = (steps - 1 - step) * 4
            before = tl.zeros((16,), tl.int32)  # keys below each candidate
            for start in range(0, length, BLOCK):
                slot = start + tl.arange(0, BLOCK)
                key = tl.load(mine + slot, mask=slot < length, other=0x7FFFFFFFFFFFFFFF)
                lower = key[:, None] < (last + (digit << shift))[None, :]
                before += tl.sum(lower.to(tl.int32), axis=0)
            last += (tl.sum((before < limit).to(tl.int64)) - 1) << shift
        last = tl.where(limit > 0, last, -1)
        per_sequence = num_tokens // num_sequences
        for start in range(0, length, BLOCK):
            slot = start + tl.arange(0, BLOCK)
            key = tl.load(mine + slot, mask=slot < length, other=0)
            place = (key >> K_BITS) & ((last * 0 + 1 << place_bits) - 1)
            token = place % per_sequence * num_sequences + place // per_sequence
            flat = token * K + (key & 15)
            late = (slot < length) & (key > last)
            tl.store(ids + flat, tl.full((BLOCK,), -1, tl.int64), mask=late)
            tl.store(weights + flat, tl.zeros((BLOCK,), tl.float32), mask=late)
