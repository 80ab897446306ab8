"""Agreement: the layer on any layout equals the oracle, forward and every gradient."""

from dataclasses import replace
from typing import Any

import pytest
import reference
import torch
import torch.distributed as dist
from routings import NUM_EXPERTS, NUM_RANKS, count, hard_cases
from spawn import run_ranks
from tolerance import assert_close
from torch import Tensor, nn

from ep_plugin import (
    ExpertGroups,
    MoEConfig,
    MoELayer,
    ParallelConfig,
    RoutingConfig,
    create_expert_groups,
)
from ep_plugin.errors import ConfigError
from ep_plugin.moe.interfaces import Routing

H, F = 16, 16
BASE = MoEConfig(
    hidden_size=H,
    ffn_hidden_size=F,
    num_experts=NUM_EXPERTS,
    bias=True,
    routing=RoutingConfig(router_dtype="fp64", router_bias=True),
)
LAYOUTS = {
    "ep=1": ParallelConfig(world_size=NUM_RANKS, ep=1),
    "ep=2": ParallelConfig(world_size=NUM_RANKS, ep=2),
    "ep=4": ParallelConfig(world_size=NUM_RANKS, ep=4),
    "ep=2 etp=2": ParallelConfig(world_size=NUM_RANKS, ep=2, etp=2),
    "ep=1 etp=4": ParallelConfig(world_size=NUM_RANKS, ep=1, etp=4),
}
WAYS: list[dict[str, Any]] = [
    {},
    {"dispatch_dedup": True},
    {"dispatcher": "symm_mem"},
    {"dispatcher": "hierarchical"},  # on 2 nodes x 2 ranks
]


class ScriptedRouter(nn.Module):
    """Sends tokens where a case says, with the probabilities a real gate would give."""

    def __init__(self, weight: Tensor, ids: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone())
        self.ids = ids

    def forward(self, hidden: Tensor, num_sequences: int) -> Routing:
        probs = (hidden @ self.weight.T).softmax(-1).gather(1, self.ids.clamp(min=0))
        return Routing(self.ids, probs, count(self.ids))


def make_weights(config: MoEConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """Full weights of all experts and the router, the same on every rank."""
    generator = torch.Generator().manual_seed(1)
    rows = F * (2 if config.gated else 1)
    shapes = {
        "router": (NUM_EXPERTS, H),
        "fc1": (NUM_EXPERTS, rows, H),
        "fc1_bias": (NUM_EXPERTS, rows),
        "fc2": (NUM_EXPERTS, H, F),
        "fc2_bias": (NUM_EXPERTS, H),
    }
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for name, shape in shapes.items()
    }


def shard(name: str, full: Tensor, config: MoEConfig, groups: ExpertGroups) -> Tensor:
    """The part of an expert weight that this rank holds."""
    local = full.chunk(groups.ep_size)[groups.ep_rank]
    if groups.etp_size == 1 or name == "fc2_bias":
        return local
    dim = 2 if name == "fc2" else 1
    halves = local.chunk(2, dim) if config.gated and name != "fc2" else (local,)
    return torch.cat([half.chunk(groups.etp_size, dim)[groups.etp_rank] for half in halves], dim)


def expert_parameters(layer: MoELayer) -> dict[str, nn.Parameter]:
    experts = layer.experts
    assert experts.linear_fc1.bias is not None
    assert experts.linear_fc2.bias is not None
    return {
        "fc1": experts.linear_fc1.weight,
        "fc1_bias": experts.linear_fc1.bias,
        "fc2": experts.linear_fc2.weight,
        "fc2_bias": experts.linear_fc2.bias,
    }


def rank_inputs(tokens: int, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """This rank's tokens [T, H] and the cotangent of its output [T, H]."""
    generator = torch.Generator().manual_seed(100 + rank)
    pair = torch.randn(2, tokens, H, generator=generator, dtype=torch.float64).to(dtype)
    return pair[0].requires_grad_(), pair[1]


def oracle(
    config: MoEConfig, ids: list[Tensor], dtype: torch.dtype
) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """Per rank the output and input gradient; the gradient of every weight, in float64."""
    weights = {name: w.double().requires_grad_() for name, w in make_weights(config, dtype).items()}
    per_rank = []
    for rank, rank_ids in enumerate(ids):
        hidden, cotangent = rank_inputs(len(rank_ids), rank, dtype)
        hidden = hidden.detach().double().requires_grad_()
        scores = (hidden @ weights["router"].T).softmax(-1)
        probs = scores.gather(1, rank_ids.clamp(min=0))
        output = reference.moe(hidden, rank_ids, probs, weights, config.activation)
        (output * cotangent.double()).sum().backward()
        grad = hidden.grad if hidden.grad is not None else torch.zeros_like(hidden)
        per_rank.append({"output": output.detach(), "hidden": grad})
    gradients = {
        name: w.grad if w.grad is not None else torch.zeros_like(w) for name, w in weights.items()
    }
    return per_rank, gradients


def check_rank(
    config: MoEConfig,
    groups: ExpertGroups,
    ids: list[Tensor],
    dtype: torch.dtype,
    what: str,
    tp: int = 1,
) -> None:
    """Run the layer on this rank and compare everything with the oracle.

    Each `tp` consecutive ranks hold the same tokens; `ids` has an entry for all of them together.
    """
    rank = dist.get_rank() // tp if dist.is_initialized() else 0
    weights = make_weights(config, dtype)
    layer = MoELayer(config, groups, init_method=None, dtype=dtype)
    router = ScriptedRouter(weights["router"], ids[rank])
    layer.router = router
    with torch.no_grad():
        for name, parameter in expert_parameters(layer).items():
            parameter.copy_(shard(name, weights[name], config, groups))
    hidden, cotangent = rank_inputs(len(ids[rank]), rank, dtype)
    output = layer(hidden)
    (output * cotangent).sum().backward()
    per_rank, gradients = oracle(config, ids, dtype)
    assert output.dtype == dtype
    assert hidden.grad is not None
    assert_close(output, per_rank[rank]["output"], dtype, f"{what}: output")
    assert_close(hidden.grad, per_rank[rank]["hidden"], dtype, f"{what}: input gradient")
    router_grad = router.weight.grad
    assert router_grad is not None
    if dist.is_initialized():
        dist.all_reduce(router_grad)  # with the dense parameters
        router_grad /= tp
    assert_close(router_grad, gradients["router"], dtype, f"{what}: router gradient")
    for name, parameter in expert_parameters(layer).items():
        grad = parameter.grad
        assert grad is not None, f"{what}: {name} has no gradient"
        if groups.edp is not None:
            dist.all_reduce(grad, group=groups.edp)
        expected = shard(name, gradients[name], config, groups)
        assert_close(grad, expected, dtype, f"{what}: {name} gradient")


def check_all_layouts() -> int:
    """Every layout x case; on a subset also both GEMM backends and every activation."""
    checked = 0
    for layout, parallel in LAYOUTS.items():
        groups = create_expert_groups(parallel, ranks_per_node=2)
        for case, ids in hard_cases().items():
            for how in WAYS:
                config = replace(BASE, gemm="loop", **how)
                what = f"{layout}, {case}, {how}"
                check_rank(config, groups, ids, torch.float64, what)
                checked += 1
        for gemm in ("loop", "torch_grouped"):
            for activation in ("swiglu", "gelu"):
                config = replace(BASE, gemm=gemm, activation=activation)
                for case in ("dropped", "a rank without tokens", "no tokens at all"):
                    what = f"{layout}, {gemm}, {activation}, {case}"
                    check_rank(config, groups, hard_cases()[case], torch.float32, what)
                    checked += 1
    return checked


def test_every_layout_equals_the_oracle() -> None:
    cases = len(LAYOUTS) * (len(WAYS) * len(hard_cases()) + 2 * 2 * 3)
    assert run_ranks(NUM_RANKS, check_all_layouts) == [cases] * NUM_RANKS


REPLICAS: list[tuple[dict[str, int], dict[str, Any]]] = [  # degrees, settings
    ({"tp": 2, "ep": 4, "etp": 1}, {"dispatcher": "hierarchical"}),
    ({"tp": 2, "ep": 2, "etp": 2}, {"dispatcher": "hierarchical"}),
    ({"tp": 2, "ep": 2, "etp": 1}, {}),
    ({"tp": 4, "ep": 1, "etp": 1}, {}),
]


def check_replicas() -> int:
    checked = 0
    for degrees, how in REPLICAS:
        parallel = ParallelConfig(world_size=NUM_RANKS, **degrees)
        groups = create_expert_groups(parallel, ranks_per_node=2, sequence_parallel=False)
        for case, ids in hard_cases().items():
            tp, what = degrees["tp"], f"{degrees}, {how}, {case}"
            config = replace(BASE, gemm="loop", **how)
            check_rank(config, groups, ids[: NUM_RANKS // tp], torch.float64, what, tp)
            checked += 1
    groups = create_expert_groups(ParallelConfig(world_size=4, tp=2), sequence_parallel=False)
    with pytest.raises(ConfigError, match="the 2 ranks of tp that hold the same tokens"):
        MoELayer(replace(BASE, bias=False, overlap="chunked"), groups)
    return checked


def test_tokens_that_tp_ranks_hold_alike_reach_an_expert_once() -> None:
    assert run_ranks(NUM_RANKS, check_replicas) == [len(REPLICAS) * len(hard_cases())] * NUM_RANKS


@pytest.mark.parametrize("case", hard_cases())
@pytest.mark.parametrize("activation", ["swiglu", "geglu", "geglu_tanh", "gelu", "relu"])
def test_one_process_without_groups_equals_the_oracle(case: str, activation: Any) -> None:
    ids = hard_cases()[case][:1]
    config = replace(BASE, activation=activation)
    check_rank(config, ExpertGroups(), ids, torch.float64, case)


def test_keeps_leading_dimensions() -> None:
    layer = MoELayer(replace(BASE, bias=False))
    hidden = torch.randn(3, 5, H)
    assert torch.equal(layer(hidden).view(15, H), layer(hidden.view(15, H)))


def test_uneven_experts_are_refused() -> None:
    message = r"num_experts \(4\) must be divisible by ep \(3\); use ep=2"
    with pytest.raises(ConfigError, match=message):
        create_uneven_layer()


def create_uneven_layer() -> MoELayer:
    class ThreeRanks(ExpertGroups):
        ep_size = 3  # type: ignore[assignment]

    return MoELayer(BASE, ThreeRanks())
