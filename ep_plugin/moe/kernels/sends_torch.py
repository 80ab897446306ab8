"""Who sends which rows to whom, and what a rank takes of them: plain torch, beside `sends`.

The group has G = `ep_size` * `etp_size` ranks; rank g hosts the `experts` experts of ep rank
g // `etp_size`. A token goes once to each rank that hosts any of its K experts. Each rank counts
what it sends; once all know all counts, rows of earlier ranks lie first.
"""

import torch
from torch import Tensor

from ep_plugin.moe.kernels.rows_torch import count_choices


def hosted(expert_ids: Tensor, experts: int, ep_size: int, etp_size: int) -> Tensor:
    """Return [T, K, G] bool: which ranks host each of `expert_ids` [T, K]; -1 = none."""
    host = expert_ids // experts  # [T, K] ep rank, -1 for none
    ranks = torch.arange(ep_size, device=host.device)
    return (host.unsqueeze(2) == ranks).repeat_interleave(etp_size, dim=2)


def count_sends(
    expert_ids: Tensor, experts: int, ep_size: int, etp_size: int
) -> tuple[Tensor, Tensor]:
    """Return `own` [3, G] int64, of the choices `expert_ids` [T, K], and what `place_sends` takes.

    `own` is the rows sent to each rank, the choices that each hosts, and T in all columns.
    """
    at = hosted(expert_ids, experts, ep_size, etp_size)
    sent = at.any(1)
    rows = sent.sum(0)
    return torch.stack([rows, at.sum((0, 1)), torch.full_like(rows, len(sent))]), sent


def place_sends(
    expert_ids: Tensor,
    sent: Tensor,
    table: Tensor,
    rank: int,
    experts: int,
    ep_size: int,
    etp_size: int,
) -> tuple[Tensor, Tensor]:
    """Return `place` [T, G] int32, each token's row on each rank, -1 = not sent; and `numbers`.

    `sent` is of `count_sends`, `table` [G, 3, G] int64 the counts `own` of all ranks; this one is
    `rank`. `numbers` [4] int64 are the rows that come here, the choices that this rank hosts, the
    most tokens of a rank, and the most rows that come to a rank.
    """
    counts = table[:, 0]
    # Along rows that lie in memory: torch sums down columns one after another on a GPU.
    earlier = sent.T.contiguous().cumsum(1).T - 1
    place = (counts[:rank].sum(0) + earlier).where(sent, -1).to(torch.int32)
    busiest = counts.sum(0).max()
    here = counts[:, rank].sum(), table[:, 1, rank].sum()
    return place, torch.stack([*here, table[:, 2].max(), busiest])


def take_own(
    chosen: Tensor, probs: Tensor, came: Tensor | None, first: int, experts: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return local ids [N, K], -1 = not here; probabilities [N, K], 0 there; counts [e] int64.

    `chosen` [N, K] int64 are expert ids; the e = `experts` from `first` on are here. With `came` []
    int64 rows from that one on are nobody's, whatever they hold. `probs` keep their dtype.
    """
    here = (chosen >= first) & (chosen < first + experts)
    if came is not None:
        rows = torch.arange(len(here), device=here.device)
        here &= (rows < came).unsqueeze(1)
    ids = (chosen - first).where(here, -1)
    return ids, probs.where(here, 0), count_choices(ids, experts)


def zero_absent(values: Tensor, expert_ids: Tensor) -> Tensor:
    """Return `values` [N, K], with 0 where `expert_ids` [N, K] is negative."""
    return values.where(expert_ids >= 0, 0)
