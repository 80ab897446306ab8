"""Our rank grids equal Megatron's RankGenerator on mixed layouts."""

import itertools

import pytest
from megatron.core.parallel_state import RankGenerator

from ep_plugin import ParallelConfig
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
