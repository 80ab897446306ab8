"""Rank grids against hand-computed answers; process groups on real ranks."""

import re
from typing import Any

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from spawn import run_ranks

from ep_plugin import ConfigError, MoEConfig, ParallelConfig, create_expert_groups
from ep_plugin.moe.groups import (
    ExpertGroups,
    RankGrid,
    by_node,
    dense_grid,
    expert_grid,
    node_size,
    rails,
    relays,
)
from ep_plugin.moe.parallel import degree
from ep_plugin.registry import resolve

CONFIG = MoEConfig(hidden_size=4, ffn_hidden_size=8, num_experts=4)


def test_documented_example() -> None:
    parallel = ParallelConfig(world_size=8, tp=2, ep=4, etp=1)
    assert dense_grid(parallel).groups("tp") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert expert_grid(parallel).groups("ep") == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert expert_grid(parallel).groups("edp") == [[0, 4], [1, 5], [2, 6], [3, 7]]


# Shape, degree -> ranks of its EP, and all that hold the same experts, by hand, after the layouts
# that DeepSpeed-MoE's groups have (arXiv:2201.05596): expert slicing is its inference layout.
def _pairs(*starts: int, step: int) -> list[list[int]]:
    return [[start, start + step] for start in starts]


DEEPSPEED: dict[str, tuple[dict[str, Any], int, list[list[int]], list[list[int]]]] = {
    "experts and data": (
        {"world_size": 16, "ep": 2},
        2,
        _pairs(*range(0, 16, 2), step=1),
        [[*range(0, 16, 2)], [*range(1, 16, 2)]],
    ),
    "with tensor parallel experts": (
        {"world_size": 16, "tp": 2, "ep": 4},
        4,
        [[0, 2, 4, 6], [1, 3, 5, 7], [8, 10, 12, 14], [9, 11, 13, 15]],
        _pairs(*range(8), step=8),
    ),
    "with whole experts under tensor parallelism": (
        {"world_size": 8, "tp": 2, "ep": 4, "etp": 1},
        4,
        [[0, 1, 2, 3], [4, 5, 6, 7]],
        _pairs(0, 1, 2, 3, step=4),
    ),
    "data before experts": (
        {"world_size": 8, "ep": 4, "order": "tp-cp-dp-ep-pp"},
        4,
        [[0, 2, 4, 6], [1, 3, 5, 7]],
        _pairs(0, 2, 4, 6, step=1),
    ),
    "pipeline": (
        {"world_size": 8, "pp": 2, "ep": 2},
        2,
        _pairs(0, 2, 4, 6, step=1),
        _pairs(0, 1, 4, 5, step=2),
    ),
    "expert slicing": (
        {"world_size": 8, "ep": 4},
        4,
        [[0, 1, 2, 3], [4, 5, 6, 7]],
        _pairs(0, 1, 2, 3, step=4),
    ),
    "32 of 128": (
        {"world_size": 128, "ep": 128},
        32,
        [[*range(first, first + 32)] for first in (0, 32, 64, 96)],
        [[rank, rank + 32, rank + 64, rank + 96] for rank in range(32)],
    ),
    "64 of 128": (
        {"world_size": 128, "ep": 128},
        64,
        [[*range(64)], [*range(64, 128)]],
        _pairs(*range(64), step=64),
    ),
    "128 of 128": (
        {"world_size": 128, "ep": 128},
        128,
        [[*range(128)]],
        [[rank] for rank in range(128)],
    ),
}


@pytest.mark.parametrize("shape", DEEPSPEED)
def test_groups_of_a_degree_are_those_of_deepspeed(shape: str) -> None:
    settings, of_layer, ep, holders = DEEPSPEED[shape]
    grid = expert_grid(ParallelConfig(**settings), of_layer)
    assert sorted(grid.groups("ep")) == ep
    assert sorted(grid.groups("copies", "edp")) == holders


def test_a_degree_is_the_most_that_divides_both() -> None:
    assert [degree(4, experts) for experts in (2, 4, 8, 6, 3)] == [2, 4, 4, 2, 1]


def test_several_axes_keep_the_order_of_the_grid() -> None:
    grid = RankGrid({"a": 2, "b": 2, "c": 2})
    assert grid.groups("c", "a") == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert grid.groups("a", "b", "c") == [list(range(8))]
    assert grid.groups() == [[rank] for rank in range(8)]


def test_expert_tensor_parallel_defaults_to_tensor_parallel() -> None:
    parallel = ParallelConfig(world_size=8, tp=2, ep=2)
    assert (parallel.etp, parallel.edp, parallel.dp) == (2, 2, 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"world_size": 8, "ep": 3},
            r"ep\*etp\*pp \(3\*1\*1\) must divide world_size \(8\); use ep=2 with etp=1",
        ),
        (
            {"world_size": 6, "tp": 2, "ep": 2},
            r"ep\*etp\*pp \(2\*2\*1\) must divide world_size \(6\); use ep=2 with etp=1",
        ),
        (
            {"world_size": 6, "tp": 4},
            r"tp\*cp\*pp \(4\) must divide world_size \(6\); use world_size=4",
        ),
        ({"world_size": 4, "ep": 0}, "ep must be at least 1; got 0"),
        ({"world_size": 4, "order": "tp-ep"}, "order must name each of tp, cp, ep, dp, pp once"),
    ],
)
def test_impossible_layouts_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ParallelConfig(**settings)  # type: ignore[arg-type]


def test_an_order_that_moves_pipeline_stages_is_refused() -> None:
    parallel = ParallelConfig(world_size=8, tp=2, pp=2, ep=4, etp=1, order="pp-tp-cp-ep-dp")
    assert expert_grid(parallel).groups("pp") == dense_grid(parallel).groups("pp")
    parallel = ParallelConfig(world_size=8, tp=2, pp=2, ep=4, etp=1, order="tp-pp-cp-ep-dp")
    with pytest.raises(ConfigError, match="other pipeline stages"):
        expert_grid(parallel)


def test_rails_join_the_ranks_of_one_place_in_every_node() -> None:
    nodes = by_node(list(range(8)), 4)
    assert nodes == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert rails(nodes) == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert [relays(nodes, rank) for rank in range(8)] == [[0, 1]] * 8
    assert rails(by_node([0, 1, 2], 4)) == [[0], [1], [2]]


def test_uneven_nodes_have_rails_that_reach_every_rank() -> None:
    nodes = by_node([2, 3, 4, 5, 6, 7], 4)  # a group that starts in the middle of a node
    assert nodes == [[2, 3], [4, 5, 6, 7]]
    assert rails(nodes) == [[2, 4, 6], [3, 5, 7]]
    # 6 is a second rank of the first rail on its node: for node 0 both send to rank 2.
    assert {rank: relays(nodes, rank) for rank in (2, 4, 6)} == {2: [0, 1], 4: [0, 1], 6: [0, 2]}
    for size in (5, 6, 7):
        found = rails(by_node(list(range(size)), 4))
        assert sorted(rank for rail in found for rank in rail) == list(range(size))


def test_torchrun_says_how_many_ranks_share_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert node_size(None) is None
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert (node_size(None), node_size(2)) == (4, 2)
    with pytest.raises(ConfigError, match="ranks_per_node must be at least 1; got 0"):
        node_size(0)


def group_ranks() -> dict[str, list[int] | None]:
    groups = create_expert_groups(ParallelConfig(world_size=4, ep=2, etp=2))
    names = ("ep", "etp", "ep_etp", "edp", "tp_cp")
    assert (groups.ep_size, groups.etp_size, groups.ep_etp_size) == (2, 2, 4)
    with pytest.raises(ConfigError, match=r"must be the number of ranks started \(4\)"):
        create_expert_groups(ParallelConfig(world_size=8))
    with pytest.raises(ConfigError, match="know which ranks share a node"):
        resolve("dispatcher", "hierarchical")(CONFIG, groups)
    return {name: dist.get_process_group_ranks(getattr(groups, name)) for name in names}


def test_every_rank_is_in_its_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    results = run_ranks(4, group_ranks)
    assert [result["etp"] for result in results] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [result["ep"] for result in results] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert [result["ep_etp"] for result in results] == [[0, 1, 2, 3]] * 4
    assert [result["edp"] for result in results] == [[0], [1], [2], [3]]


def test_no_groups_means_one_rank() -> None:
    groups = ExpertGroups()
    assert (groups.ep_size, groups.ep_rank, groups.etp_size, groups.ep_etp_size) == (1, 0, 1, 1)


@given(
    tp=st.sampled_from([1, 2, 4]),
    ep=st.integers(1, 16),
    etp=st.none() | st.integers(1, 8),
    stages=st.sampled_from([1, 2]),
    data=st.integers(1, 8),
)
def test_advice_on_experts_over_ranks_is_taken_and_keeps_ep_where_it_can(
    tp: int, ep: int, etp: int | None, stages: int, data: int
) -> None:
    world = tp * stages * data
    sizes: Any = {"world_size": world, "tp": tp, "pp": stages}
    try:
        ParallelConfig(**sizes, ep=ep, etp=etp)
    except ConfigError as error:
        found = re.search(r"use ep=(\d+) with etp=(\d+)", str(error))
        assert found is not None
        new_ep, new_etp = map(int, found.groups())
        ParallelConfig(**sizes, ep=new_ep, etp=new_etp)
        assert (new_ep == ep) == (world // stages % ep == 0)
