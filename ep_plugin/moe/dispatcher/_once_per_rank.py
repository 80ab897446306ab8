"""Deduplicated dispatch: a token goes once to each rank that hosts any of its experts."""

from typing import NamedTuple

import torch
from torch import Tensor

from ep_plugin.moe.kernels.sends_torch import hosted
from ep_plugin.moe.rows import Rows, count_choices, rows_of


class Hosts(NamedTuple):
    """Which of the G = ep * etp ranks host which experts; rank = ep rank * etp_size + etp rank."""

    experts: int  # per rank
    ep_size: int
    etp_size: int

    def wanted(self, expert_ids: Tensor) -> Tensor:
        """Return [T, G] bool: whether a rank hosts any of a token's `expert_ids` [T, K]."""
        return self.hosted(expert_ids).any(1)

    def hosted(self, expert_ids: Tensor) -> Tensor:
        """Return [T, K, G] bool: which ranks host each of `expert_ids` [T, K]; -1 = none."""
        return hosted(expert_ids, *self)

    def local(self, expert_ids: Tensor, rank: Tensor) -> Tensor:
        """Return `expert_ids` [P, K] as local ids of each row's `rank` [P]; -1 = elsewhere."""
        here = expert_ids // self.experts == (rank // self.etp_size).unsqueeze(1)
        return (expert_ids % self.experts).where(here, -1)


class Copies(NamedTuple):
    """Rows to send, sorted by destination."""

    rows: Rows
    token: Tensor  # [P] token of each row
    destination: Tensor  # [P] of each row


def once_for_each(wanted: Tensor, num_rows: int) -> Copies:
    """Return one row for each true entry of `wanted` [T, D] bool; there are `num_rows` of them."""
    destinations = wanted.shape[1]
    columns = torch.arange(destinations, device=wanted.device)
    ids = columns.where(wanted, -1)
    rows = rows_of(ids, count_choices(ids, destinations), num_rows)
    return Copies(rows, rows.order // destinations, rows.order % destinations)
