"""The layer over several ranks: exchanges alone, computation alone, both, and the share hidden.

Started once a rank: torchrun --nproc-per-node 2 -m ep_plugin.cli bench overlap

Every rank has the shape's tokens and experts. `exchange_ms` is dispatch and combine around experts
that return their tokens, forward and backward, packing included; `compute_ms` is router and experts
on tokens that were received before; `ms` is the layer. What is hidden is how much less the layer
takes than both together, as a share of the exchange. Times are those of the slowest rank.
"""

import os
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from ep_plugin.bench import timeline
from ep_plugin.bench.case import Case, make_case
from ep_plugin.bench.contest import OURS, Contest
from ep_plugin.bench.floors import Precision, layer_floor
from ep_plugin.bench.measure import Step, Timing
from ep_plugin.bench.rows import Row, make_row
from ep_plugin.bench.shapes import Shape
from ep_plugin.config import ConfigError, Fp8, MoEConfig, RoutingConfig
from ep_plugin.contracts import Dispatched, combine, dispatch
from ep_plugin.groups import ExpertGroups, create_expert_groups
from ep_plugin.layer import MoELayer
from ep_plugin.parallel import ParallelConfig

DISPATCHERS: dict[str, dict[str, Any]] = {
    "alltoall": {"dispatcher": "alltoall"},
    "alltoall+dedup": {"dispatcher": "alltoall", "dispatch_dedup": True},
    "alltoall+dedup+fp8": {
        **{"dispatcher": "alltoall", "dispatch_dedup": True, "dispatch_dtype": "fp8"}
    },
    "symm_mem": {"dispatcher": "symm_mem"},
    "hierarchical": {"dispatcher": "hierarchical"},
}
SCHEDULES = ("serial", "chunked")
TIMEOUT = timedelta(minutes=2)  # of a rank that waits for one that failed


def join_ranks(device: torch.device) -> None:
    """Start torch.distributed as torchrun says; raises ConfigError for a process on its own."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        raise ConfigError(
            "bench overlap needs at least 2 ranks; this process is alone; torchrun "
            "--nproc-per-node 2 -m ep_plugin.cli bench overlap would do"
        )
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)


def leave_ranks() -> None:
    """End torch.distributed, all ranks together."""
    dist.barrier()
    dist.destroy_process_group()


def measure(contest: Contest, shape: Shape, routing: str) -> list[Row]:
    """Return a row for each recipe, dispatcher and schedule that is not measured yet."""
    ranks, device = dist.get_world_size(), contest.protocol.device
    case = make_case(replace(shape, experts=shape.experts * ranks), routing, device)
    groups = create_expert_groups(ParallelConfig(world_size=ranks, ep=ranks))
    found: list[_Variant] = []
    for _, precision in contest.entries((OURS,)):
        for recipe in get_args(Fp8):
            if (recipe == "off") == (precision == "bf16"):
                found += _variants(contest, case, precision, recipe, groups)
    found = [v for v in found if not contest.has(**v.identity(shape, routing, ranks))]
    steps = {f"{i}/{part}": step for i, v in enumerate(found) for part, step in v.steps().items()}
    times, gpu = contest.protocol.interleave(steps, f"overlap {shape.name} {routing}")
    rows = []
    for i, variant in enumerate(found):
        whole, exchange, compute = (
            _slowest(times[f"{i}/{part}"], device) for part in ("layer", "exchange", "compute")
        )
        saved = exchange.median + compute.median - whole.median
        rows.append(
            make_row(
                *(device, whole),
                **variant.identity(shape, routing, ranks),
                exchange_ms=exchange.median,
                compute_ms=compute.median,
                hidden_share=min(1.0, max(0.0, saved / exchange.median)),
                dims={"tokens": shape.tokens, "topk": shape.topk, "hidden": shape.hidden},
                floor_ms=layer_floor(shape, variant.precision),
                gpu=gpu,
            )
        )
    return rows


@dataclass(frozen=True)
class _Variant:
    """A layer in one recipe, with one dispatcher, in one order."""

    case: Case
    backend: str
    precision: Precision
    dispatcher: str
    schedule: str
    layer: MoELayer

    def identity(self, shape: Shape, routing: str, ranks: int) -> dict[str, Any]:
        return {
            **{"bench": "overlap", "shape": shape.name, "routing": routing, "ep": ranks},
            **{"backend": self.backend, "precision": self.precision},
            **{"dispatcher": self.dispatcher, "schedule": self.schedule},
        }

    def steps(self) -> dict[str, Step]:
        return {"layer": self.step, "exchange": self._exchange(), "compute": self._compute()}

    def step(self, index: int) -> None:
        """One forward and backward of the layer; gradients are made anew."""
        tokens = self.case.tokens[index]
        torch.autograd.backward(self.layer(tokens), self.case.grads[index])
        self._forget(tokens)

    def _exchange(self) -> Step:
        routings = [self.layer.router(tokens.detach()) for tokens in self.case.tokens]

        def step(index: int) -> None:
            tokens, routing = self.case.tokens[index], routings[index]
            probs = routing.probs.detach().requires_grad_()
            inbox = dispatch(self.layer.dispatcher, tokens, replace(routing, probs=probs))
            returned = combine(self.layer.dispatcher, inbox.tokens, inbox)
            # The experts' gradients of probabilities travel home beside those of tokens.
            loss = inbox.probs, torch.ones_like(inbox.probs)
            torch.autograd.backward((returned, loss[0]), (self.case.grads[index], loss[1]))
            self._forget(tokens)

        return step

    def _compute(self) -> Step:
        inboxes = [self._received(tokens) for tokens in self.case.tokens]
        grads = [torch.randn_like(inbox.tokens) for inbox in inboxes]

        def step(index: int) -> None:
            tokens, inbox = self.case.tokens[index], inboxes[index]
            probs = self.layer.router(tokens).probs
            outbox = self.layer.experts(inbox)
            torch.autograd.backward((outbox, probs), (grads[index], torch.ones_like(probs)))
            self._forget(tokens, inbox.tokens, inbox.probs)

        return step

    @torch.no_grad()
    def _received(self, tokens: Tensor) -> Dispatched:
        inbox = dispatch(self.layer.dispatcher, tokens, self.layer.router(tokens))
        with torch.enable_grad():
            leaves = {n: getattr(inbox, n).detach().requires_grad_() for n in ("tokens", "probs")}
        return replace(inbox, **leaves)

    def _forget(self, *tensors: Tensor) -> None:
        for tensor in (*tensors, *self.layer.parameters()):
            tensor.grad = None


def _variants(
    contest: Contest, case: Case, precision: Precision, recipe: Fp8, groups: ExpertGroups
) -> list[_Variant]:
    """Return what can run of one recipe, after a step each; why another cannot is noted."""
    found = []
    for dispatcher, options in DISPATCHERS.items():
        for schedule in SCHEDULES:
            suffix = "" if recipe == "off" else f"+{recipe}"
            with contest.attempt(OURS + suffix, precision):
                layer = _layer(case, groups, fp8=recipe, overlap=schedule, **options)
                variant = _Variant(case, OURS + suffix, precision, dispatcher, schedule, layer)
                variant.step(0)
                found.append(variant)
    return found


def _layer(case: Case, groups: ExpertGroups, **options: Any) -> MoELayer:
    shape = case.shape
    config = MoEConfig(
        hidden_size=shape.hidden,
        ffn_hidden_size=shape.ffn,
        num_experts=shape.experts,
        routing=RoutingConfig(topk=shape.topk, aux_loss_coeff=0.01),
        **options,
    )
    layer = MoELayer(config, groups, init_method=None, device=case.device, dtype=case.router.dtype)
    mine = slice(*(shape.experts // groups.ep_size * (groups.ep_rank + i) for i in (0, 1)))
    weights = {
        "router.weight": case.router,
        "experts.linear_fc1.weight": case.fc1[mine],
        "experts.linear_fc2.weight": case.fc2[mine],
    }
    layer.load_state_dict(weights, assign=True)
    layer.experts.weights_change_every_call = False
    return layer


def _slowest(time: Timing, device: torch.device) -> Timing:
    """Return the times of the rank that took longest."""
    values = torch.tensor([time.median, time.p10, time.p90], dtype=torch.float64, device=device)
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return Timing(*values.tolist())


def trace(shape: Shape, routing: str, device: torch.device) -> dict[str, Any]:
    """Return a timeline of two steps of the layer in chunks, as this rank sees it."""
    case = make_case(replace(shape, experts=shape.experts * dist.get_world_size()), routing, device)
    groups = ExpertGroups(ep=dist.group.WORLD, ep_etp=dist.group.WORLD)
    layer = _layer(case, groups, overlap="chunked", **DISPATCHERS["alltoall+dedup"])
    timeline.mark(layer)
    variant = _Variant(case, OURS, "bf16", "alltoall+dedup", "chunked", layer)
    return timeline.record(variant.step, device)
