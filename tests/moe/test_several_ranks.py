"""The layer on two and four ranks equals the whole layer on one, whatever carries its tokens.

One rank computes all ranks' tokens with all experts. In FP8 both are held against the float64
oracle: spreading the experts may not add to the error. The same function runs on the CPU and, with
NCCL, on GPUs.
"""

from dataclasses import replace
from typing import Any

import pytest
import reference
import torch
import torch.distributed as dist
from overlap_cases import ScriptedRouter
from spawn import run_ranks
from symm_mem_cases import MULTICAST_OFF
from tolerance import assert_close, error
from torch import Tensor

from ep_plugin import (
    ExpertGroups,
    MoEConfig,
    MoELayer,
    ParallelConfig,
    RoutingConfig,
    create_expert_groups,
)

H, F, E, K = 128, 128, 8, 3
TOKENS = (40, 24, 0, 17)  # of each rank
BASE = MoEConfig(hidden_size=H, ffn_hidden_size=F, num_experts=E, routing=RoutingConfig(topk=K))
WAYS: list[dict[str, Any]] = [
    {"dispatcher": "alltoall"},
    {"dispatcher": "alltoall", "dispatch_dedup": True},
    {"dispatcher": "alltoall", "overlap": "chunked"},
    {"dispatcher": "alltoall", "dispatch_dedup": True, "overlap": "chunked"},
    {"dispatcher": "symm_mem"},
    {"dispatcher": "hierarchical"},  # on two nodes
]
FP8_WAYS: list[dict[str, Any]] = [
    {"dispatcher": "alltoall", "dispatch_dtype": "fp8"},
    {"dispatcher": "alltoall", "dispatch_dedup": True, "dispatch_dtype": "fp8"},
    {"dispatcher": "hierarchical", "dispatch_dtype": "fp8"},
]
ADDED_ERROR = {  # times what the same costs on one rank, squared
    "fp8": 1.05,
    "off": 1.5,  # ranks' sums for a token are rounded to bf16 on their way home: once more
}


def draw(dtype: torch.dtype, ranks: int) -> dict[str, Tensor]:
    """Weights of all experts, tokens and gradients of all ranks; the same everywhere."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    count = sum(TOKENS[:ranks])
    ids = torch.rand(count, E, generator=generator).topk(K, dim=1).indices
    return {
        "fc1": normal(E, 2 * F, H, scale=H**-0.5),
        "fc2": normal(E, H, F, scale=F**-0.5),
        "hidden": normal(count, H),
        "grads": normal(count, H),
        "ids": ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.2, -1),
        "probs": torch.rand(count, K, generator=generator),
    }


def compute(
    config: MoEConfig, groups: ExpertGroups, case: dict[str, Tensor], device: torch.device
) -> dict[str, Tensor]:
    """Return the output and all gradients for the tokens of `case`, on this rank's experts."""
    layer = MoELayer(config, groups, init_method=None, device=device, dtype=case["hidden"].dtype)
    router = ScriptedRouter(case["ids"].to(device), case["probs"].to(device), E)
    layer.router = router
    with torch.no_grad():
        for name in ("fc1", "fc2"):
            mine = case[name].chunk(groups.ep_size)[groups.ep_rank]
            getattr(layer.experts, f"linear_{name}").weight.copy_(mine)
    hidden = case["hidden"].to(device, copy=True).requires_grad_()
    output = layer(hidden)
    (output * case["grads"].to(device)).sum().backward()
    fc1, fc2 = layer.experts.linear_fc1.weight.grad, layer.experts.linear_fc2.weight.grad
    found = {"output": output, "hidden": hidden.grad, "probs": router.probs.grad}
    return {k: v.detach().cpu() for k, v in (found | {"fc1": fc1, "fc2": fc2}).items()}  # type: ignore[union-attr]


def oracle(case: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same in float64, token by token."""
    weights = {name: case[name].double().requires_grad_() for name in ("fc1", "fc2")}
    zeros = {"fc1_bias": torch.zeros(E, 2 * F).double(), "fc2_bias": torch.zeros(E, H).double()}
    hidden = case["hidden"].to(torch.float64, copy=True).requires_grad_()
    probs = case["probs"].double().masked_fill(case["ids"] < 0, 0).requires_grad_()
    output = reference.moe(hidden, case["ids"], probs, weights | zeros, "swiglu")
    (output * case["grads"].double()).sum().backward()
    leaves = {"hidden": hidden, "probs": probs, **weights}
    return {"output": output.detach()} | {k: v.grad for k, v in leaves.items()}  # type: ignore[misc]


def part(whole: dict[str, Tensor], rank: int, ranks: int) -> dict[str, Tensor]:
    """What one rank has of tokens and weights."""
    first = sum(TOKENS[:rank])
    tokens = slice(first, first + TOKENS[rank])
    experts = slice(rank * E // ranks, (rank + 1) * E // ranks)
    return {k: v[experts if k in ("fc1", "fc2") else tokens] for k, v in whole.items()}


def check_ways(device_type: str) -> int:
    """Every way in every precision; returns how many were compared."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device("cpu")
    parallel = ParallelConfig(world_size=ranks, ep=ranks)
    groups = create_expert_groups(parallel, ranks_per_node=ranks // 2)
    exact = torch.bfloat16 if device_type == "cuda" else torch.float32
    checked = 0
    for fp8 in ("off", "rowwise", "blockwise"):
        dtype = exact if fp8 == "off" else torch.bfloat16
        case = draw(dtype, ranks)
        config = replace(BASE, fp8=fp8, deterministic=True)
        whole = compute(config, ExpertGroups(), case, device)
        truth = oracle(case)
        mine = part(case, rank, ranks) | {name: case[name] for name in ("fc1", "fc2")}
        for how in WAYS + (FP8_WAYS if fp8 != "off" else []):
            found = compute(replace(config, **how), groups, mine, device)
            again = compute(replace(config, **how), groups, mine, device)
            for name, value in part(whole, rank, ranks).items():
                what = f"{fp8}, {how}: {name}"
                assert torch.equal(found[name], again[name]), what
                if fp8 == "off":
                    assert_close(found[name], value.double(), dtype, what)
                expected = part(truth, rank, ranks)[name]
                least = error(value, expected)
                added = ADDED_ERROR["off" if fp8 == "off" else "fp8"]
                assert error(found[name], expected) <= added * least + 1e-12, what
            checked += 1
    return checked


CASES = 3 * len(WAYS) + 2 * len(FP8_WAYS)


@pytest.mark.parametrize("ranks", [2, 4])
def test_cpu_ranks(ranks: int) -> None:
    assert run_ranks(ranks, check_ways, "cpu") == [CASES] * ranks


@pytest.mark.multi_gpu
@pytest.mark.parametrize("ranks", [2, 4])
def test_gpus(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"fewer than {ranks} GPUs")
    for name, value in MULTICAST_OFF.items():
        monkeypatch.setenv(name, value)
    assert run_ranks(ranks, check_ways, "cuda", backend="nccl") == [CASES] * ranks
