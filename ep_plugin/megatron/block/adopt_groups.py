"""Our expert groups beside Megatron's: those it built are adopted where the ranks agree."""

from typing import Any

import torch.distributed as dist

from ep_plugin.errors import ConfigError
from ep_plugin.moe.groups import ExpertGroups, RankGrid, by_node, dense_grid, expert_grid, rails
from ep_plugin.moe.parallel import ParallelConfig

EP_FASTEST = "ep-tp-cp-dp-pp"  # slices of an expert lie ep ranks apart; of ep-plugin generate
# Megatron's default, and --use-tp-pp-dp-mapping.
ORDERS = ("tp-cp-ep-dp-pp", "tp-cp-ep-pp-dp", EP_FASTEST)


def adopt_groups(
    pg_collection: Any,
    pipeline_size: int,
    shared: dict[str, Any],
    ranks_per_node: int | None = None,
    replicated: bool = False,
) -> ExpertGroups:
    """Return the groups of a ProcessGroupCollection as ours, each checked against our own grids.

    `shared` is handed on to the layers: give those of one model the same. With `ranks_per_node` the
    ranks of each expert group together create those within and between nodes; nothing else is
    communicated. `replicated` says that tensor-parallel ranks hold the same tokens. Raises
    ConfigError when Megatron laid the ranks out in a way we would not.
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
        raise ConfigError(
            f"Megatron's process groups are not the ones expected: {problems[0]}; give the groups "
            "that megatron.core.parallel_state makes"
        )
    intra_node = inter_node = None
    if ranks_per_node is not None and parallel.ep * parallel.expert_tp > 1:
        intra_node, inter_node = _node_groups(pg_collection.tp_ep, ranks_per_node, shared)
    return ExpertGroups(
        ep=_several(pg_collection.ep),
        etp=_several(pg_collection.expt_tp),
        ep_etp=_several(pg_collection.tp_ep),
        edp=_several(pg_collection.expt_dp),
        tp_cp=_several(pg_collection.cp if replicated else pg_collection.tp_cp),
        tp_dp_cp=_several(pg_collection.tp_dp_cp),
        replicas=_several(pg_collection.tp) if replicated else None,
        intra_node=intra_node,
        inter_node=inter_node,
        ranks_per_node=ranks_per_node,
        ep_fastest=problems[:2].count(None) == 0,
        shared=shared,
    )


def _node_groups(
    group: dist.ProcessGroup, ranks_per_node: int, shared: dict[str, Any]
) -> list[dist.ProcessGroup]:
    """Return the parts of `group` this rank is in, within its node and between nodes; once made.

    Only the ranks of `group` come here: a pipeline stage may have no MoE layer.
    """
    if "node_groups" not in shared:
        rank, nodes = dist.get_rank(), by_node(dist.get_process_group_ranks(group), ranks_per_node)
        parts = [next(p for p in cut if rank in p) for cut in (nodes, rails(nodes))]
        shared["node_groups"] = [
            dist.new_group(part, use_local_synchronization=True) for part in parts
        ]
    made: list[dist.ProcessGroup] = shared["node_groups"]
    return made


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
