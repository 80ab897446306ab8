"""two_batch on two micro-batches equals two calls of the layer, gradients too, to the bit."""

from dataclasses import replace
from itertools import cycle
from typing import Any

import torch
import torch.distributed as dist
from overlap_cases import BASE, ScriptedRouter, routings
from routings import NUM_EXPERTS
from spawn import run_ranks
from torch import Tensor, nn

from ep_plugin import (
    ExpertGroups,
    MoEConfig,
    MoELayer,
    ParallelConfig,
    RoutingConfig,
    create_expert_groups,
)
from ep_plugin.moe.interfaces import Routing
from ep_plugin.moe.schedule.two_batch import two_batch
from ep_plugin.registry import resolve

Pairs = dict[str, Tensor]


class Alternating(nn.Module):
    """A router for each of two micro-batches, in turn; the layer goes on with what it hands on."""

    def __init__(self, *routers: nn.Module) -> None:
        super().__init__()
        self.routers = nn.ModuleList(routers)
        self.turn = cycle(self.routers)

    def forward(self, hidden: Tensor, num_sequences: int) -> Routing:
        routing: Routing = next(self.turn)(hidden, num_sequences)
        return replace(routing, hidden=-hidden)


def results(layer: MoELayer, batches: list[Tensor], together: bool) -> Pairs:
    """Return both outputs and all gradients."""
    for leaf in (*batches, *layer.parameters()):
        leaf.grad = None
    first, second = batches
    outputs = two_batch(layer, first, second) if together else (layer(first), layer(second))
    generator = torch.Generator().manual_seed(11)
    weights = [torch.randn(output.shape, generator=generator) for output in outputs]
    torch.stack([(o * w).sum() for o, w in zip(outputs, weights, strict=True)]).sum().backward()
    leaves = {"first": first, "second": second, **dict(layer.named_parameters())}
    found = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    return found | {name: leaf.grad for name, leaf in leaves.items()}  # type: ignore[dict-item]


def assert_equal(layer: MoELayer, batches: list[Tensor], what: str) -> None:
    found, expected = results(layer, batches, True), results(layer, batches, False)
    for name, value in expected.items():
        assert torch.equal(found[name], value), f"{what}: {name}"
    assert any(value.any() for value in expected.values()) or not any(map(len, batches)), what


def make_layer(config: MoEConfig, groups: ExpertGroups) -> MoELayer:
    torch.manual_seed(3 + dist.get_rank())
    shared = nn.Linear(config.hidden_size, config.hidden_size)
    return MoELayer(config, groups, shared_expert=shared)


VARIANTS: list[dict[str, Any]] = [
    {},
    {"dispatch_dedup": True, "save": "recompute"},
    {"dispatcher": "symm_mem", "shared_expert": "learned"},
    {"activation": "swiglu", "overlap": "shared_expert"},
]


def check_hard_cases() -> int:
    groups = create_expert_groups(ParallelConfig(world_size=4, ep=4))
    rank, cases, checked = dist.get_rank(), list(routings().values()), 0
    for variant in VARIANTS:
        for pair in zip(cases, cases[1:] + cases[:1], strict=True):
            layer = make_layer(replace(BASE, **variant), groups)
            ids = [case[rank] for case in pair]
            layer.router = Alternating(*(ScriptedRouter(i, torch.rand(i.shape)) for i in ids))
            batches = [torch.randn(len(i), BASE.hidden_size).requires_grad_() for i in ids]
            assert_equal(layer, batches, f"{variant}, pair {checked}")
            checked += 1
    return checked


def check_a_real_router(etp: int) -> int:
    groups = create_expert_groups(ParallelConfig(world_size=4, ep=2, etp=etp))
    routing = RoutingConfig(topk=2, aux_loss_coeff=0.1, z_loss_coeff=0.1, expert_bias=True)
    config = replace(BASE, routing=routing, num_experts=2 * NUM_EXPERTS, overlap="two_batch")
    layer = make_layer(config, groups)
    for sequences in (1, 3):
        shapes = [(5 + dist.get_rank(), sequences), (4, 2)]
        batches = [torch.randn(*shape, BASE.hidden_size).requires_grad_() for shape in shapes]
        assert_equal(layer, batches, f"{sequences} sequences")
    return sequences


def check() -> list[int]:
    return [check_hard_cases(), check_a_real_router(etp=1), check_a_real_router(etp=2)]


def test_two_batches_have_the_bits_of_two_calls() -> None:
    """Also with losses and a balancing bias, which see one micro-batch after the other."""
    assert run_ranks(4, check) == [[len(VARIANTS) * len(routings()), 3, 3]] * 4


def test_one_call_alone_is_serial() -> None:
    layer = MoELayer(BASE)
    built = [resolve("overlap", name)(BASE, layer) for name in ("two_batch", "serial")]
    assert built[0] is built[1]
