"""Our expert groups beside Megatron's: those it built are adopted where the ranks agree.

A layer with fewer experts than its ranks could share has groups of a smaller degree, made here once
for each degree.
"""

from dataclasses import replace
from datetime import timedelta
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
    degree: int | None = None,
    minutes: int | None = None,
) -> ExpertGroups:
    """Return the groups of a ProcessGroupCollection as ours, each checked against our own grids.

    `shared` is handed on to the layers: give those of one model the same. With `ranks_per_node` the
    ranks of each expert group together create those within and between nodes. With a `degree` below
    the size of `ep` they create groups of that degree; nothing else is communicated. What is made
    here waits `minutes`, or as long as torch's groups do by default. `replicated` says that
    tensor-parallel ranks hold the same tokens. Raises ConfigError when Megatron laid the ranks out
    in a way we would not.
    """
    parallel = ParallelConfig(
        world_size=dist.get_world_size(),
        tp=pg_collection.tp.size(),
        pp=pipeline_size,
        cp=pg_collection.cp.size(),
        ep=pg_collection.ep.size(),
        etp=pg_collection.expt_tp.size(),
    )
    problems = {order: _mismatch(pg_collection, parallel, order) for order in ORDERS}
    if all(problems.values()):
        raise ConfigError(
            f"Megatron's process groups are not the ones expected: {problems[ORDERS[0]]}; give the "
            "groups that megatron.core.parallel_state makes"
        )
    groups = ExpertGroups(
        ep=_several(pg_collection.ep),
        etp=_several(pg_collection.expt_tp),
        ep_etp=_several(pg_collection.tp_ep),
        edp=_several(pg_collection.expt_dp),
        tp_cp=_several(pg_collection.cp if replicated else pg_collection.tp_cp),
        tp_dp_cp=_several(pg_collection.tp_dp_cp),
        replicas=_several(pg_collection.tp) if replicated else None,
        ranks_per_node=ranks_per_node,
        ep_fastest=not any(problems[order] is None for order in ORDERS[:2]),
        shared=shared,
    )
    timeout = None if minutes is None else timedelta(minutes=minutes)
    if degree is not None and degree < parallel.ep:
        order = next(order for order, problem in problems.items() if problem is None)
        laid_out = ParallelConfig(**{**vars(parallel), "order": order})
        groups = _of_degree(groups, laid_out, degree, timeout)
    if ranks_per_node is None or groups.ep_etp is None:
        return groups
    intra_node, inter_node = _node_groups(groups.ep_etp, ranks_per_node, groups.shared, timeout)
    return replace(groups, intra_node=intra_node, inter_node=inter_node)


def _of_degree(
    groups: ExpertGroups, parallel: ParallelConfig, degree: int, timeout: timedelta | None
) -> ExpertGroups:
    """Return `groups` of an expert-parallel group as those of layers of a smaller degree.

    They are made once, by the ranks of each alone, and have a buffer of their own to share.
    """
    shared = groups.shared.setdefault(f"degree {degree}", {})
    if shared.get("of") is not groups.ep:
        grid = expert_grid(parallel, degree)
        ep, copies = (_own_group(grid, timeout, axis) for axis in ("ep", "copies"))
        ep_etp = ep if parallel.expert_tp == 1 else _own_group(grid, timeout, "etp", "ep")
        made = {"ep": ep, "copies": copies, "ep_etp": ep_etp}
        shared |= {"of": groups.ep, "groups": made}
    return replace(groups, **shared["groups"], shared=shared)


def _own_group(grid: RankGrid, timeout: timedelta | None, *axes: str) -> dist.ProcessGroup | None:
    """Create this rank's group along `axes`; None for one of itself alone."""
    rank = dist.get_rank()
    ranks = next(ranks for ranks in grid.groups(*axes) if rank in ranks)
    if len(ranks) == 1:
        return None
    made = dist.new_group(ranks, timeout=timeout, use_local_synchronization=True)
    assert isinstance(made, dist.ProcessGroup)
    return made


def _node_groups(
    group: dist.ProcessGroup,
    ranks_per_node: int,
    shared: dict[str, Any],
    timeout: timedelta | None,
) -> list[dist.ProcessGroup]:
    """Return the parts of `group` this rank is in, within its node and between nodes; once made.

    Only the ranks of `group` come here: a pipeline stage may have no MoE layer.
    """
    if "node_groups" not in shared:
        rank, nodes = dist.get_rank(), by_node(dist.get_process_group_ranks(group), ranks_per_node)
        parts = [next(p for p in cut if rank in p) for cut in (nodes, rails(nodes))]
        shared["node_groups"] = [
            dist.new_group(part, timeout=timeout, use_local_synchronization=True) for part in parts
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
