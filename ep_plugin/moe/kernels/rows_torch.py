"""Plain-torch twins of `kernels.move_rows`: sorting choices, copying tokens, summing rows.

Rows past the last expert's belong to absent choices. The kernels do not write them; the twins set
them to zero.
"""

import torch
from torch import Tensor

from ep_plugin.moe.e4m3 import E4M3, Values8


def count_choices(expert_ids: Tensor, num_experts: int) -> Tensor:
    """Return how many of `expert_ids` [N, C] (-1: absent) name each expert: [e] int64."""
    bucket = expert_ids.where(expert_ids >= 0, num_experts).flatten()
    counts = bucket.new_zeros(num_experts + 1)
    return counts.scatter_add(0, bucket, torch.ones_like(bucket))[:-1]


def sort_choices(expert_ids: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return `order` [N * C], the flat choice of each row; `place` [N, C]; `ends` [e]; all int32.

    `place` is the row of each choice, `ends` the row after each expert's last. It is a stable
    counting sort of `expert_ids` [N, C]; absent choices, -1, come last. `counts` [e] int64 says how
    many are each expert's.
    """
    flat = expert_ids.flatten()
    order = flat.where(flat >= 0, len(counts)).argsort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    ends = counts.cumsum(0, dtype=torch.int32)
    return order.int(), place.view_as(expert_ids).int(), ends


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
    num_tokens, choices = place.shape
    if into is None:
        size = num_tokens * choices if num_rows is None else num_rows
        into = tokens.new_zeros(size, tokens.shape[1])
    at = place.flatten()
    chosen = (at < ends[-1]).nonzero().squeeze(1)
    into[at[chosen].long()] = tokens[chosen // max(choices, 1)]
    return into


def spread_rows8(
    tokens: Values8, place: Tensor, ends: Tensor, num_rows: int | None = None
) -> Values8:
    """Do what `spread_rows` does, for tokens in e4m3 with their scales."""
    planned, scale = (place, ends, num_rows), tokens.scale
    data = spread_rows(tokens.data.view(torch.uint8), *planned).view(E4M3)
    rows = spread_rows(scale.reshape(len(scale), scale[:1].numel()), *planned)
    return type(tokens)(data, rows.view(len(rows), *scale.shape[1:]))


def sum_rows(rows: Tensor, place: Tensor, ends: Tensor, into: Tensor | None = None) -> Tensor:
    """Return for each token the sum of its rows of `rows` [R, X]: [N, X] in their dtype.

    Sums are taken in fp32; absent choices add nothing. With `into` [N, X], contiguous, they are
    added to it, and it is returned; of a token without a row nothing is read or written there.
    """
    wide = rows if rows.dtype == torch.float64 else rows.float()
    absent = place >= ends[-1]
    if not len(rows):
        return rows.new_zeros(len(place), rows.shape[1]) if into is None else into
    chosen = wide[place.masked_fill(absent, 0)].masked_fill(absent.unsqueeze(-1), 0)  # [N, C, X]
    return chosen.sum(dim=1).to(rows.dtype) if into is None else into.add_(chosen.sum(dim=1))


def sum_pieces(pieces: list[Tensor]) -> Tensor:
    """Return the sum of two or more `pieces` [N, X], added in order in fp32 or wider: [N, X]."""
    dtype = pieces[0].dtype
    total = pieces[0].to(torch.promote_types(dtype, torch.float32), copy=True)
    for piece in pieces[1:]:
        total += piece
    return total.to(dtype)
