"""A token sent once to each place that wants it, not once for each of its experts."""

from typing import NamedTuple

import torch
from torch import Tensor

from ep_plugin.moe.rows import Rows, count_choices, rows_of


class Hosts(NamedTuple):
    """Which ranks of the expert group host which experts; ranks count etp fastest."""

    experts: int  # of a rank
    ep_size: int
    etp_size: int

    def wanted(self, expert_ids: Tensor) -> Tensor:
        """Return [T, G] bool: whether a rank hosts any of the `expert_ids` [T, K], -1 = none."""
        return self.hosted(expert_ids).any(1)

    def hosted(self, expert_ids: Tensor) -> Tensor:
        """Return [T, K, G] bool: whether a rank hosts each of the `expert_ids`, -1 = none."""
        host = expert_ids // self.experts  # [T, K] ep rank, -1 for none
        ranks = torch.arange(self.ep_size, device=host.device)
        return (host.unsqueeze(2) == ranks).repeat_interleave(self.etp_size, dim=2)

    def local(self, expert_ids: Tensor, rank: Tensor) -> Tensor:
        """Return `expert_ids` [P, K] as the experts of each row's `rank` [P]; -1 = elsewhere."""
        here = expert_ids // self.experts == (rank // self.etp_size).unsqueeze(1)
        return (expert_ids % self.experts).where(here, -1)


class Copies(NamedTuple):
    """Rows to send, by destination."""

    rows: Rows
    token: Tensor  # [P] of each row
    destination: Tensor  # [P]


def once_for_each(wanted: Tensor, num_rows: int) -> Copies:
    """Return a row for each token and destination in `wanted` [T, D] bool, `num_rows` in all."""
    destinations = wanted.shape[1]
    columns = torch.arange(destinations, device=wanted.device)
    ids = columns.where(wanted, -1)
    rows = rows_of(ids, count_choices(ids, destinations), num_rows)
    return Copies(rows, rows.order // destinations, rows.order % destinations)
