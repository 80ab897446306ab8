"""The layer over several ranks: exchanges alone, computation alone, both, and the share hidden.

Started once a rank: torchrun --nproc-per-node 2 -m ep_plugin.cli bench overlap

Every rank has the shape's tokens and experts, and all start each step together. `exchange_ms` is
dispatch and combine around experts that return their tokens, forward and backward, packing
included; `compute_ms` is router and experts on tokens that were received before; `ms` is the layer,
with an eighth of what quantising its weights takes, as in `bench layer`. What is hidden is how much
less the layer takes than both together, as a share of the exchange: `hidden_share`, what hiding
costs counted in. `covered_share` is the time on the wire beside which the GPU works. Times are
those of the slowest rank. `wire_ms` are the kernels that move rows between GPUs, `gbps` what leaves
a GPU meanwhile.
"""

import os
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import product
from typing import Any, get_args

import torch
import torch.distributed as dist

from ep_plugin.commands.bench import timeline
from ep_plugin.commands.bench.accumulate import WeightGradients, train_step
from ep_plugin.commands.bench.alone import Alone, goes_by_swaps
from ep_plugin.commands.bench.case import Case, Contender, make_case
from ep_plugin.commands.bench.contest import OURS, Contest, peer
from ep_plugin.commands.bench.covered import covered_share, spans_of
from ep_plugin.commands.bench.figures import Row, make_row
from ep_plugin.commands.bench.floors import Gradients, Precision, Work, floor_ms
from ep_plugin.commands.bench.measure import Protocol, Step, Timing, captured
from ep_plugin.commands.bench.ours import as_contender, make_layer
from ep_plugin.commands.bench.rounds import ready
from ep_plugin.commands.bench.shapes import Shape
from ep_plugin.commands.bench.whole_layer import (
    saved_mib,
    weight_ms,
    weight_step,
    with_weights,
)
from ep_plugin.errors import ConfigError
from ep_plugin.moe.config import Fp8
from ep_plugin.moe.groups import ExpertGroups, create_expert_groups
from ep_plugin.moe.layer import MoELayer
from ep_plugin.moe.parallel import ParallelConfig

DISPATCHERS: dict[str, dict[str, Any]] = {
    "alltoall": {"dispatcher": "alltoall"},
    "alltoall+dedup": {"dispatcher": "alltoall", "dispatch_dedup": True},
    "alltoall+dedup+fp8": {
        **{"dispatcher": "alltoall", "dispatch_dedup": True, "dispatch_dtype": "fp8"}
    },
    "symm_mem": {"dispatcher": "symm_mem"},
    "hierarchical": {"dispatcher": "hierarchical"},
    "deepep": {"dispatcher": "deepep"},
}
RECIPES: tuple[str, ...] = get_args(Fp8)
SCHEDULES = ("serial", "chunked")
CAPTURABLE = ("symm_mem",)  # without a host sync while a graph is captured
PEERS = ("megatron", "torchtitan")  # that have experts on several ranks
TIMEOUT = timedelta(minutes=2)  # of a rank that waits for one that failed


def join_ranks(device: torch.device) -> None:
    """Start torch.distributed as torchrun says; raises ConfigError for a process on its own."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        raise ConfigError(
            "bench overlap needs at least 2 ranks; this process is alone; use torchrun "
            "--nproc-per-node 2 -m ep_plugin.cli bench overlap"
        )
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)


def leave_ranks() -> None:
    """End torch.distributed, all ranks together."""
    dist.barrier()
    dist.destroy_process_group()


def _identity(
    backend: str, precision: str, dispatcher: str, schedule: str, **where: Any
) -> dict[str, Any]:
    """Return what tells a row from others; `where` says shape, routing, ep and graph."""
    return {
        **{"bench": "overlap", "backend": backend, "precision": precision},
        **{"dispatcher": dispatcher, "schedule": schedule, **where},
    }


@dataclass(frozen=True)
class _Entry:
    """A layer that takes part; ours also says how its exchange and computation go alone."""

    contender: Contender
    dispatcher: str
    schedule: str
    gradients: Gradients
    layer: MoELayer | None = None

    def identity(self, **where: Any) -> dict[str, Any]:
        name = self.contender.backend, self.contender.precision
        how = {"gradients": self.gradients, **where}
        return _identity(*name, self.dispatcher, self.schedule, **how)

    @property
    def way(self) -> str:
        """What exchange and computation alone depend on."""
        swaps = self.layer is not None and goes_by_swaps(self.layer)
        way = f"{self.contender.backend}/{self.dispatcher}/{self.gradients}"
        return f"{way} by swaps" if swaps else way

    @property
    def name(self) -> str:
        return f"{self.way}/{self.schedule}"


def measure(contest: Contest, shape: Shape, routing: str) -> list[Row]:
    """Return a row for each recipe, dispatcher and schedule that is not measured yet."""
    ranks, protocol = dist.get_world_size(), contest.protocol
    where = {"shape": shape.name, "routing": routing, "ep": ranks, "graph": contest.cuda_graph}
    case = make_case(replace(shape, experts=shape.experts * ranks), routing, protocol.device)
    groups = create_expert_groups(ParallelConfig(world_size=ranks, ep=ranks))
    entries = [
        entry
        for entry in _take_part(contest, case, groups, where)
        if not contest.has(**entry.identity(**where))
    ]
    alone = {
        e.way: Alone(e.layer, case, WeightGradients(case, e.contender, e.gradients))
        for e in entries
        if e.layer is not None
    }
    steps: dict[str, Step] = {}
    pool = torch.cuda.graph_pool_handle() if contest.cuda_graph else None
    for entry in entries:
        train = train_step(case, entry.contender, entry.gradients)
        step = captured(train, pool) if contest.cuda_graph else train
        made = {"step": step, **weight_step(entry.contender, train)}
        steps |= {f"{entry.name}/{part}": step for part, step in made.items()}
    for way, apart in alone.items():
        made = {"exchange": apart.exchange, "compute": apart.compute}
        if contest.cuda_graph:
            made = {name: captured(step, pool) for name, step in made.items()}
        steps |= {f"{way}/{name}": step for name, step in made.items()}
    times, gpu = protocol.interleave(steps, f"overlap {shape.name} {routing}")
    times = {name: _slowest(time, protocol.device) for name, time in times.items()}
    shared = {way: _parts(apart, way, times, protocol) for way, apart in alone.items()}
    covered = {e.name: _covered(steps[f"{e.name}/step"], protocol) for e in entries}
    rows = []
    for entry in entries:
        prefix = f"{entry.name}/"
        own = {n.removeprefix(prefix): t for n, t in times.items() if n.startswith(prefix)}
        weights = weight_ms(own)
        rows.append(
            make_row(
                protocol.device,
                with_weights(own["step"], weights),
                **entry.identity(**where),
                **_hidden(shared.get(entry.way), own["step"].median),
                covered_share=covered[entry.name],
                weight_quant_ms=weights,
                dims={"tokens": shape.tokens, "topk": shape.topk, "hidden": shape.hidden},
                floor_ms=floor_ms(
                    Work(shape, entry.contender.precision, entry.gradients, ranks), contest.rates
                ),
                rates=contest.rates.facts(),
                switches=entry.contender.switches,
                saved_mib=saved_mib(case, entry.contender),
                gpu=gpu,
            )
        )
    return rows


def _hidden(parts: dict[str, float] | None, together: float) -> dict[str, Any]:
    """Return the parts' milliseconds and the share of the exchange that is hidden."""
    if parts is None:
        return {}
    exchange = parts["exchange_ms"]
    saved = exchange + parts["compute_ms"] - together
    return {**parts, "hidden_share": min(1.0, max(0.0, saved / exchange))}


def _take_part(
    contest: Contest, case: Case, groups: ExpertGroups, where: dict[str, Any]
) -> list[_Entry]:
    """Return what can run, after a step each; why another cannot is noted."""
    found = []
    for name, precision in contest.entries((OURS,) if contest.cuda_graph else (OURS, *PEERS)):
        if name in PEERS:
            with contest.attempt(name, precision):
                makers = peer(name)(case, precision)
                peers = ready(contest, case, precision, makers)
                found += [
                    _Entry(contender, contender.dispatcher, "serial", gradients)
                    for contender in peers
                    for gradients in contest.gradients
                ]
            continue
        for recipe, dispatcher, schedule in our_ways(contest, precision):
            backend = OURS if recipe == "off" else f"{OURS}+{recipe}"
            known = _identity(backend, precision, dispatcher, schedule, **where)
            kinds = [g for g in contest.gradients if not contest.has(**known, gradients=g)]
            if not kinds:
                continue
            options = {"fp8": recipe, "overlap": schedule, **DISPATCHERS[dispatcher]}
            with contest.attempt(backend, precision, one_of_several=True):
                layer = make_layer(case, groups, **options)
                contender = as_contender(layer, backend, precision)
                train_step(case, contender)(0)
                found += [_Entry(contender, dispatcher, schedule, g, layer) for g in kinds]
    return found


def our_ways(contest: Contest, precision: Precision) -> list[tuple[str, str, str]]:
    """Return recipe, dispatcher and schedule of each layer of ours that shall be measured."""
    recipes = [r for r in contest.recipes or RECIPES if (r == "off") == (precision == "bf16")]
    names = contest.dispatchers or tuple(DISPATCHERS)
    dispatchers = [n for n in names if n in CAPTURABLE or not contest.cuda_graph]
    return list(product(recipes, dispatchers, SCHEDULES))


def _parts(
    alone: Alone, way: str, times: dict[str, Timing], protocol: Protocol
) -> dict[str, float]:
    """Return the figures of exchange and computation alone."""
    parts = {f"{name}_ms": times[f"{way}/{name}"].median for name in ("exchange", "compute")}
    wire = alone.wire(protocol)
    if wire is not None:
        # A rank that is early waits in its kernels: the last one's are closest to the wire's time.
        (milliseconds,) = _over_ranks([wire.ms], dist.ReduceOp.MIN, protocol.device)
        (leaving,) = _over_ranks([wire.num_bytes], dist.ReduceOp.SUM, protocol.device)
        leaving /= dist.get_world_size()
        parts |= {"wire_ms": milliseconds, "gbps": leaving / milliseconds / 1e6}
    return parts


def _covered(step: Step, protocol: Protocol) -> float | None:
    """Return the mean over ranks of the share of the wire's time beside work; None on the CPU."""
    if protocol.device.type != "cuda":
        return None
    share = covered_share(spans_of(step, protocol)) or 0.0
    (total,) = _over_ranks([share], dist.ReduceOp.SUM, protocol.device)
    return total / dist.get_world_size()


def _slowest(time: Timing, device: torch.device) -> Timing:
    """Return the times of the rank that took longest."""
    return Timing(*_over_ranks([time.median, time.p10, time.p90], dist.ReduceOp.MAX, device))


def _over_ranks(
    values: list[float], how: dist.ReduceOp.RedOpType, device: torch.device
) -> list[float]:
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, how)
    found: list[float] = tensor.tolist()
    return found


def trace(shape: Shape, routing: str, device: torch.device, graph: bool) -> dict[str, Any]:
    """Return a timeline of two steps of the layer in chunks, as this rank sees it."""
    case = make_case(replace(shape, experts=shape.experts * dist.get_world_size()), routing, device)
    groups = ExpertGroups(ep=dist.group.WORLD, ep_etp=dist.group.WORLD)
    one_host = os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]
    way = "symm_mem" if device.type == "cuda" and one_host else "alltoall+dedup"
    layer = make_layer(case, groups, overlap="chunked", **DISPATCHERS[way])
    timeline.mark(layer)
    step = train_step(case, as_contender(layer, OURS, "bf16"))
    if graph:
        step = captured(step, torch.cuda.graph_pool_handle())
    return timeline.record(step, device)
