"""Which ranks work together: rank grids as pure lists, then process groups made from them.

Megatron lays ranks out on two grids over the same world, here for its default order, slowest axis
first:

    dense    [pp, dp, cp, tp]          experts    [pp, edp, ep, etp]

A group is a line of a grid along one axis, or along several axes together. For 8 ranks, tp=2,
ep=4, etp=1: the dense groups of tp are 01 23 45 67; the expert groups of ep are 0123 4567, of edp
04 15 26 37.
"""

import itertools
import os
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from ep_plugin.errors import ConfigError
from ep_plugin.moe.parallel import ParallelConfig, Ranks, RanksOfNode
from ep_plugin.typed import Typed, typed
from ep_plugin.untrusted import shown

# Its name from torch 2.14 on, where the older one warns.
all_gather_single: Any = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


@dataclass(frozen=True)
class RankGrid(Typed):
    """Ranks 0 .. n-1 arranged on named axes, fastest axis first."""

    sizes: dict[str, Ranks]

    def groups(self, *axes: str) -> list[list[int]]:
        """Return every group along `axes` together; within a group the grid's order is kept.

        Groups are listed in the order of their remaining coordinates, fastest axis first.
        """
        strides, stride = {}, 1
        for axis, size in self.sizes.items():
            strides[axis] = stride
            stride *= size
        inside = [axis for axis in self.sizes if axis in axes]
        outside = [axis for axis in self.sizes if axis not in axes]
        return [
            [base + offset for offset in self._offsets(inside, strides)]
            for base in self._offsets(outside, strides)
        ]

    def _offsets(self, axes: list[str], strides: dict[str, int]) -> list[int]:
        # itertools.product varies its last argument fastest, so the axes go in slowest first.
        steps = ([i * strides[axis] for i in range(self.sizes[axis])] for axis in reversed(axes))
        return [sum(step) for step in itertools.product(*steps)]


def dense_grid(parallel: ParallelConfig) -> RankGrid:
    """Return the grid of the dense part: axes tp, cp, dp, pp."""
    sizes = {"tp": parallel.tp, "cp": parallel.cp, "dp": parallel.dp, "pp": parallel.pp}
    return RankGrid({axis: sizes[axis] for axis in parallel.order.split("-") if axis in sizes})


def expert_grid(parallel: ParallelConfig, degree: int | None = None) -> RankGrid:
    """Return the grid of the experts: axes etp, ep, edp, pp.

    With `degree`, a divisor of ep, it is that of a layer whose experts are spread over so many
    ranks: the axis ep has that size, and the axis `copies` behind it is over the blocks of ranks
    that each have all of the layer's experts. Raises ConfigError when it would put a rank on
    another pipeline stage than the dense grid does.
    """
    names = {"tp": "etp", "ep": "ep", "dp": "edp", "pp": "pp"}
    sizes = {
        "etp": parallel.expert_tp,
        "ep": parallel.ep,
        "edp": parallel.edp,
        "pp": parallel.pp,
    }
    order = [names[axis] for axis in parallel.order.split("-") if axis in names]
    grid = RankGrid({axis: sizes[axis] for axis in order})
    if grid.groups("pp") != dense_grid(parallel).groups("pp"):
        raise ConfigError(
            f"<order> ({parallel.order}) gives experts other pipeline stages than the dense "
            f"layers at pp={parallel.pp}, ep={parallel.ep}, etp={parallel.etp}; use "
            "<order=tp-cp-ep-dp-pp>"
        )
    if degree is None:
        return grid
    cut: dict[str, int] = {}
    for axis, size in grid.sizes.items():
        cut |= {"ep": degree, "copies": size // degree} if axis == "ep" else {axis: size}
    return RankGrid(cut)


@dataclass(frozen=True)
class ExpertGroups(Typed):
    """This rank's process groups for the experts; None stands for a group of this rank alone.

    `ep` hosts one copy of all experts; `etp` splits each expert's FFN dimension; `ep_etp` is both
    together, the ranks a token can travel to (etp fastest); `edp` holds the same shard; `tp_cp`
    shares one batch's tokens, and `tp_dp_cp` all batches of a step, for losses that count over it.
    `copies` are the ranks within one expert-parallel group of the model that hold the same experts
    of a layer, which has too few for all its ranks; `ep` is then a part of that group, and each of
    `copies` has seen tokens of its own, so that expert gradients are summed over it.
    `replicas` are ranks that hold the same tokens, which then travel once for all of them; tokens
    of other ranks of `tp_cp` are other ones.
    `intra_node` and `inter_node` cut `ep_etp` as `by_node` and `rails` do; they are there when
    `ranks_per_node` is known.
    `shared` is what the layers of these groups have together, by name: a communication buffer.
    """

    ep: dist.ProcessGroup | None = None
    etp: dist.ProcessGroup | None = None
    ep_etp: dist.ProcessGroup | None = None
    edp: dist.ProcessGroup | None = None
    copies: dist.ProcessGroup | None = None
    tp_cp: dist.ProcessGroup | None = None
    tp_dp_cp: dist.ProcessGroup | None = None
    replicas: dist.ProcessGroup | None = None
    intra_node: dist.ProcessGroup | None = None
    inter_node: dist.ProcessGroup | None = None
    ranks_per_node: Ranks | None = None  # of the world: ranks 0 .. n-1 are on the first node
    ep_fastest: bool = False  # how ep_etp counts, else etp fastest; for dispatcher alltoall alone
    shared: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def ep_size(self) -> int:
        return group_size(self.ep)

    @property
    def ep_rank(self) -> int:
        return group_rank(self.ep)

    @property
    def etp_size(self) -> int:
        return group_size(self.etp)

    @property
    def etp_rank(self) -> int:
        return group_rank(self.etp)

    @property
    def ep_etp_size(self) -> int:
        return self.ep_size * self.etp_size

    @property
    def tp_cp_size(self) -> int:
        return group_size(self.tp_cp)


def group_size(group: dist.ProcessGroup | None) -> int:
    """Return the number of ranks in `group`, 1 for None."""
    return 1 if group is None else dist.get_world_size(group)


def group_rank(group: dist.ProcessGroup | None) -> int:
    """Return this rank's place in `group`, 0 for None."""
    return 0 if group is None else dist.get_rank(group)


def by_node(ranks: list[int], ranks_per_node: int) -> list[list[int]]:
    """Cut the ranks of a group, in ascending order, where a node ends.

    With 4 ranks a node, ranks 2 .. 7 are [2, 3] and [4, 5, 6, 7].
    """
    return [list(node) for _, node in itertools.groupby(ranks, lambda r: r // ranks_per_node)]


def rails(nodes: list[list[int]]) -> list[list[int]]:
    """Return the groups of ranks that exchange between `nodes`: those of the same place in each.

    Nodes of different sizes have as many rails as the smallest has ranks, and the larger ones
    several ranks on each: [2, 3] and [4, 5, 6, 7] have the rails [2, 4, 6] and [3, 5, 7].
    """
    size = min(map(len, nodes))
    return [[rank for node in nodes for rank in node[place::size]] for place in range(size)]


def relays(nodes: list[list[int]], rank: int) -> list[int]:
    """Return for each node who takes the tokens of `rank` there, by its place on their rail.

    On the own node it is `rank` itself.
    """
    size = min(map(len, nodes))
    place = next(node.index(rank) for node in nodes if rank in node)
    on_rail = [len(node[place % size :: size]) for node in nodes]
    starts = [0, *itertools.accumulate(on_rail)]
    return [start + place // size % n for start, n in zip(starts, on_rail, strict=False)]


@typed
def node_size(ranks_per_node: RanksOfNode | None) -> int | None:
    """Return `ranks_per_node`, or what torchrun says when it is None, or None when nobody does.

    Raises ConfigError when it is not positive.
    """
    said = os.environ.get("LOCAL_WORLD_SIZE")
    if ranks_per_node is not None or said is None:
        return ranks_per_node
    if not said.isdecimal() or int(said[:9]) < 1:
        raise ConfigError(
            f"LOCAL_WORLD_SIZE must be the number of ranks on this node; got {shown(said)}; use "
            "LOCAL_WORLD_SIZE=8, or start the ranks with torchrun, which sets it"
        )
    return int(said[:9])


@typed
def create_expert_groups(
    parallel: ParallelConfig,
    ranks_per_node: RanksOfNode | None = None,
    sequence_parallel: bool = True,
) -> ExpertGroups:
    """Create the process groups of `parallel` on an initialised torch.distributed world.

    Every rank must call it, in the same order as any other group creation. `ranks_per_node` says
    which ranks share a node; None takes torchrun's LOCAL_WORLD_SIZE, where there is one. Without
    `sequence_parallel` the ranks of a tp group hold the same tokens. Raises ConfigError when the
    world has another size than `parallel` says.
    """
    world = dist.get_world_size()
    if world != parallel.world_size:
        raise ConfigError(
            f"<world_size> ({parallel.world_size}) must be the number of ranks started ({world}); "
            f"use <world_size={world}>"
        )
    ranks_per_node = node_size(ranks_per_node)
    experts, dense = expert_grid(parallel), dense_grid(parallel)
    replicated = parallel.tp > 1 and not sequence_parallel
    nodes: list[list[list[int]]] = []  # of each ep_etp group
    if ranks_per_node is not None:
        nodes = [by_node(ranks, ranks_per_node) for ranks in experts.groups("ep", "etp")]
    return ExpertGroups(
        ep=_own_group(experts.groups("ep")),
        etp=_own_group(experts.groups("etp")),
        ep_etp=_own_group(experts.groups("ep", "etp")),
        edp=_own_group(experts.groups("edp")),
        tp_cp=_own_group(dense.groups(*(("cp",) if replicated else ("tp", "cp")))),
        tp_dp_cp=_own_group(dense.groups("tp", "dp", "cp")),
        replicas=_own_group(dense.groups("tp")) if replicated else None,
        intra_node=_own_group([ranks for group in nodes for ranks in group]),
        inter_node=_own_group([ranks for group in nodes for ranks in rails(group)]),
        ranks_per_node=ranks_per_node,
    )


def _own_group(groups: list[list[int]]) -> dist.ProcessGroup | None:
    """Create every group of the list, on every rank in the same order; return this rank's."""
    own = None
    for ranks in groups:
        group = dist.new_group(ranks)
        if isinstance(group, dist.ProcessGroup):
            own = group
    return own
