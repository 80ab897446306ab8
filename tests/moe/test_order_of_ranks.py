"""Slices of an expert that lie apart (`ep_fastest`): served by alltoall, refused by all others."""

from typing import Any

import torch
import torch.distributed as dist
from spawn import run_ranks

from ep_plugin import ConfigError, MoEConfig, MoELayer, ParallelConfig
from ep_plugin.moe.groups import ExpertGroups, expert_grid
from ep_plugin.registry import available

ORDER = "ep-tp-cp-dp-pp"


def sliced_groups() -> ExpertGroups:
    grid = expert_grid(ParallelConfig(world_size=4, ep=2, etp=2, order=ORDER))
    made = {}
    for name, axes in {"ep": ["ep"], "etp": ["etp"], "ep_etp": ["ep", "etp"]}.items():
        for ranks in grid.groups(*axes):
            group = dist.new_group(ranks)
            if dist.get_rank() in ranks:
                made[name] = group
    return ExpertGroups(**made, ep_fastest=True)


def refusals(ways: list[dict[str, Any]]) -> list[str]:
    """Return what is said of each way to send tokens; "" where it is served."""
    said, groups = [], sliced_groups()
    for way in ways:
        config = MoEConfig(hidden_size=8, ffn_hidden_size=16, num_experts=4, **way)
        try:
            MoELayer(config, groups)(torch.ones(3, 8))
        except ConfigError as error:
            said.append(str(error))
        else:
            said.append("")
    return said


def test_only_plain_alltoall_serves_slices_that_lie_apart() -> None:
    names = [name for name in available("dispatcher") if name not in ("alltoall", "local")]
    ways: list[dict[str, Any]] = [{"dispatcher": name} for name in names]
    ways += [{"dispatcher": "alltoall", "dispatch_dedup": True}, {"dispatcher": "alltoall"}]
    for said in run_ranks(4, refusals, ways):
        assert said[-1] == ""
        for way, text in zip(ways[:-1], said[:-1], strict=True):
            assert "use dispatcher='alltoall' with dispatch_dedup=False" in text, way
