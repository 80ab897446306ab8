"""Sorting rows by expert on one rank: the local half of every dispatcher.

For top-2 of 3 tokens a b c that chose (E1 E0) (E0 -) (E2 E0), `-` meaning dropped:

    choice, flat [T*K]     0:aE1 1:aE0 2:bE0 3:b- 4:cE2 5:cE0
    order                  1 2 5 0 4 | 3                        (stable; dropped choices go last)
    rows                   a b c a c                            E0: a b c   E1: a   E2: c
"""

from torch import Tensor


def expert_order(expert_ids: Tensor, num_experts: int) -> Tensor:
    """Return the flat choices [T*K] of `expert_ids` [T, K] in expert order, dropped ones last."""
    flat = expert_ids.flatten()
    return flat.where(flat >= 0, num_experts).argsort(stable=True)


def permute(hidden: Tensor, order: Tensor, topk: int) -> Tensor:
    """Return the row of `hidden` [T, H] for each choice of `order` [N]: [N, H]."""
    return hidden[order // topk]


def unpermute(rows: Tensor, order: Tensor, num_tokens: int, topk: int) -> Tensor:
    """Sum `rows` [N, H] per token: [T, H], the transpose of `permute`.

    Each choice gets a slot of its own before the sum, so that the result does not depend on the
    order in which additions happen to run.
    """
    width = rows.shape[1]
    slots = rows.new_zeros(num_tokens * topk, width)  # [T*K, H]
    return slots.index_copy(0, order, rows).view(num_tokens, topk, width).sum(dim=1)
