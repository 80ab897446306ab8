"""Our rank grids equal Megatron's RankGenerator on mixed layouts."""

import itertools
from datetime import timedelta
from typing import Any
from unittest.mock import Mock

import pytest
import torch.distributed as dist
from megatron.core.parallel_state import RankGenerator

from ep_plugin import ParallelConfig
from ep_plugin.megatron.block.adopt_groups import adopt_groups
from ep_plugin.moe.groups import dense_grid, expert_grid

pytestmark = pytest.mark.megatron


def layouts() -> list[ParallelConfig]:
    """Every valid layout of these degrees on 8, 16 and 24 ranks, in Megatron's two orders."""
    found = []
    for world, tp, cp, pp, ep, etp in itertools.product(
        (8, 16, 24), (1, 2, 4), (1, 2), (1, 2, 3), (1, 2, 4, 8), (1, 2)
    ):
        if world % (tp * cp * pp) or world % (ep * etp * pp):
            continue
        degrees = {"world_size": world, "tp": tp, "cp": cp, "pp": pp, "ep": ep, "etp": etp}
        found.append(ParallelConfig(**degrees))
        if tp * cp == etp * ep:  # with pp in the middle both grids need stages of equal stride
            found.append(ParallelConfig(**degrees, order="tp-cp-ep-pp-dp"))
    return found


def test_grids_equal_megatron() -> None:
    checked = 0
    for parallel in layouts():
        dense = RankGenerator(
            tp=parallel.tp,
            ep=1,
            dp=parallel.dp,
            pp=parallel.pp,
            cp=parallel.cp,
            order=parallel.order,
        )
        experts = RankGenerator(
            tp=parallel.expert_tp,
            ep=parallel.ep,
            dp=parallel.edp,
            pp=parallel.pp,
            cp=1,
            order=parallel.order,
        )
        for axes in (["tp"], ["cp"], ["dp"], ["pp"], ["tp", "cp"], ["dp", "cp"], ["tp", "pp"]):
            assert dense_grid(parallel).groups(*axes) == dense.get_ranks("-".join(axes)), parallel
        ours_to_theirs = {"etp": "tp", "ep": "ep", "edp": "dp", "pp": "pp"}
        for axes in (["etp"], ["ep"], ["edp"], ["pp"], ["etp", "ep"], ["etp", "ep", "pp"]):
            theirs = experts.get_ranks("-".join(ours_to_theirs[axis] for axis in axes))
            assert expert_grid(parallel).groups(*axes) == theirs, (parallel, axes)
        checked += 1
    assert checked >= 30


def test_groups_of_a_degree_wait_as_long_as_the_run_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks of a layer, those with the same experts, and those of a host and between hosts."""
    made: list[tuple[list[int], Any]] = []

    def group(ranks: list[int]) -> Any:
        found = Mock(spec=dist.ProcessGroup, ranks=ranks)
        found.size.return_value = len(ranks)
        return found

    def new_group(ranks: list[int], timeout: Any = None, **_: Any) -> Any:
        made.append((ranks, timeout))
        return group(ranks)

    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda found: found.ranks)
    monkeypatch.setattr(dist, "new_group", new_group)
    every, alone = group([0, 1, 2, 3]), group([1])
    collection = Mock(
        **dict.fromkeys(("ep", "tp_ep", "tp_dp_cp"), every),
        **dict.fromkeys(("tp", "cp", "expt_tp", "expt_dp", "tp_cp"), alone),
    )
    adopt_groups(collection, 1, {}, ranks_per_node=1, degree=2, minutes=7)
    assert [ranks for ranks, _ in made] == [[0, 1], [1, 3], [1], [0, 1]]
    assert {timeout for _, timeout in made} == {timedelta(minutes=7)}
