"""Plain-torch twins of `kernels.rows`: counting and sorting choices, spreading and summing rows.

Where the kernels leave rows behind the last expert's as they are, the twins hold zeros.
"""

import torch
from torch import Tensor

from ep_plugin.moe.e4m3 import E4M3, Values8


def count_choices(expert_ids: Tensor, num_experts: int) -> Tensor:
    """Return how many of `expert_ids` [N, C] are each expert's, -1 for none's: [e] int64."""
    bucket = expert_ids.where(expert_ids >= 0, num_experts).flatten()
    counts = bucket.new_zeros(num_experts + 1)
    return counts.scatter_add(0, bucket, torch.ones_like(bucket))[:-1]


def sort_choices(expert_ids: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Return the flat choice of each row [R] and the row of each choice [N, C], int32.

    A stable counting sort of `expert_ids` [N, C]; absent choices, -1, come last. `ends` [e] int32
    is the row behind each expert's last.
    """
    flat = expert_ids.flatten()
    order = flat.where(flat >= 0, len(ends)).argsort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    return order.int(), place.view_as(expert_ids).int()


def spread_rows(
    tokens: Tensor,
    place: Tensor,
    ends: Tensor,
    num_rows: int | None = None,
    into: Tensor | None = None,
) -> Tensor:
    """Return the token of `tokens` [N, X] of each row, rows at `place` [N, C]: [R, X].

    R is `num_rows`, at least the last of `ends`, or N * C. Rows of other tokens stay as they are
    in `into`, where that is given.
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
    """Do as `spread_rows` for tokens in e4m3."""
    planned, scale = (place, ends, num_rows), tokens.scale
    data = spread_rows(tokens.data.view(torch.uint8), *planned).view(E4M3)
    rows = spread_rows(scale.reshape(len(scale), scale[:1].numel()), *planned)
    return type(tokens)(data, rows.view(len(rows), *scale.shape[1:]))


def sum_rows(rows: Tensor, place: Tensor, ends: Tensor) -> Tensor:
    """Return the sums in fp32 of each token's rows [R, X], absent choices left out: [N, X]."""
    wide = rows if rows.dtype == torch.float64 else rows.float()
    absent = place >= ends[-1]
    if not len(rows):
        return rows.new_zeros(len(place), rows.shape[1])
    chosen = wide[place.masked_fill(absent, 0)].masked_fill(absent.unsqueeze(-1), 0)  # [N, C, X]
    return chosen.sum(dim=1).to(rows.dtype)


def sum_pieces(pieces: list[Tensor]) -> Tensor:
    """Return the sum [N, X] of at least two `pieces` [N, X], in their order, in fp32 at least."""
    dtype = pieces[0].dtype
    total = pieces[0].to(torch.promote_types(dtype, torch.float32), copy=True)
    for piece in pieces[1:]:
        total += piece
    return total.to(dtype)
