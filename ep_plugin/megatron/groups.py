"""Our expert groups beside Megatron's: those it built are adopted where the ranks agree."""

from typing import Any

import torch.distributed as dist

from ep_plugin.config import ConfigError
from ep_plugin.groups import ExpertGroups, RankGrid, dense_grid, expert_grid
from ep_plugin.parallel import ParallelConfig

ORDERS = ("tp-cp-ep-dp-pp", "tp-cp-ep-pp-dp")  # Megatron's default, and --use-tp-pp-dp-mapping


def adopt_groups(pg_collection: Any, pipeline_size: int, shared: dict[str, Any]) -> ExpertGroups:
    """Return the groups of a ProcessGroupCollection as ours, each checked against our own grids.

    `shared` is handed on to the layers: give those of one model the same.
    Nothing is communicated. Raises ConfigError when Megatron laid the ranks out in a way we would
    not.
    """
    parallel = ParallelConfig(
        world_size=dist.get_world_size(),
        tp=pg_collection.tp.size(),
        pp=pipeline_size,
        cp=pg_collection.cp.size(),
        ep=pg_collection.ep.size(),
        etp=pg_collection.expt_tp.size(),
    )
    problems = [_mismatch(pg_collection, parallel, order) for order in ORDERS]
    if all(problems):
        raise ConfigError(f"Megatron's process groups are not the ones expected: {problems[0]}")
    return ExpertGroups(
        ep=_several(pg_collection.ep),
        etp=_several(pg_collection.expt_tp),
        ep_etp=_several(pg_collection.tp_ep),
        edp=_several(pg_collection.expt_dp),
        tp_cp=_several(pg_collection.tp_cp),
        tp_dp_cp=_several(pg_collection.tp_dp_cp),
        shared=shared,
    )


def _mismatch(pg_collection: Any, parallel: ParallelConfig, order: str) -> str | None:
    """Return the first group that is not where `order` puts it, or None."""
    ordered = ParallelConfig(**{**vars(parallel), "order": order})
    try:
        experts, dense = expert_grid(ordered), dense_grid(ordered)
    except ConfigError as error:
        return str(error)
    expected: list[tuple[str, RankGrid, tuple[str, ...]]] = [
        ("ep", experts, ("ep",)),
        ("expt_tp", experts, ("etp",)),
        ("tp_ep", experts, ("etp", "ep")),
        ("expt_dp", experts, ("edp",)),
        ("tp_cp", dense, ("tp", "cp")),
        ("tp_dp_cp", dense, ("tp", "dp", "cp")),
    ]
    rank = dist.get_rank()
    for name, grid, axes in expected:
        ours = next(ranks for ranks in grid.groups(*axes) if rank in ranks)
        theirs = dist.get_process_group_ranks(getattr(pg_collection, name))
        if ours != theirs:
            return f"group {name} of rank {rank} is {theirs}, order {order} gives {ours}"
    return None


def _several(group: dist.ProcessGroup) -> dist.ProcessGroup | None:
    return group if group.size() > 1 else None
