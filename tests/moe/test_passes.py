"""`rank_capacity`: the experts run in passes of so many rows, and compute what they do at once."""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from overlap_cases import ScriptedRouter
from spawn import run_ranks
from tolerance import error
from torch import Tensor

from ep_plugin import ExpertGroups, MoEConfig, MoELayer, ParallelConfig, create_expert_groups
from ep_plugin.moe.dispatcher import symm_mem
from ep_plugin.moe.e4m3 import BLOCK
from ep_plugin.moe.experts.experts import Experts
from ep_plugin.moe.experts.fused import ALIGNED, Keep

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from counted import Counted, counted

EXPERTS, TOPK, TOKENS = 8, 2, 101
BASE = MoEConfig(
    hidden_size=40, ffn_hidden_size=24, num_experts=EXPERTS, gemm="torch_grouped", save="bf16"
)
PRECISIONS: list[dict[str, Any]] = [
    {},
    {"fp8": "rowwise", "hidden_size": 48, "ffn_hidden_size": 32, "gemm": "auto"},
    {"fp8": "blockwise", "fp8_wgrad": "bf16", "save": "fp8"},
    {"fp8": "blockwise", "save": "recompute", "gemm": "auto"},
]
BOUND = {"off": 1e-5, "rowwise": 2**-8, "blockwise": 0.05}  # of e4m3 that is kept or not
IN_A_GRAPH: dict[str, Any] = {"dispatcher": "symm_mem"}
CHUNKED: dict[str, Any] = {"overlap": "chunked"}
WAYS: list[tuple[dict[str, Any], bool]] = [  # and whether shapes are those of a graph
    ({"dispatcher": "alltoall"}, False),
    ({"dispatcher": "alltoall", "dispatch_dedup": True, **CHUNKED}, False),
    *((IN_A_GRAPH, graph) for graph in (False, True)),
    *(({**IN_A_GRAPH, **CHUNKED}, graph) for graph in (False, True)),
]
FACTORS = (0.25, 1.0, 1.3)
WIDE = 192
A_MESSAGE = 4 * TOKENS * TOPK * 48  # bytes of one rank's, which a thread of gloo may hold longer


@contextmanager
def as_in_a_graph(wanted: bool) -> Iterator[None]:
    """Give shapes the worst case, as while a CUDA graph is captured: the host knows no counts."""
    with patch.object(symm_mem, "_captured", lambda _: True) if wanted else nullcontext():
        yield


class Sums:
    """Totals that a training loop adds to."""

    def __init__(self, layer: MoELayer) -> None:
        self.pair = [torch.ones_like(p, dtype=torch.float32) for p in layer.experts.parameters()]

    def take(self) -> Any:
        return tuple(self.pair)


def chosen(generator: torch.Generator, experts: int) -> tuple[Tensor, Tensor]:
    """Return the choices of a rank's tokens among the first `experts`, which are on rank 0."""
    ids = torch.rand(TOKENS, experts, generator=generator).topk(TOPK, dim=1).indices
    return ids, torch.rand(TOKENS, TOPK, generator=generator)


def outcome(
    config: MoEConfig, groups: ExpertGroups, graph: bool = False, totals: bool = False
) -> tuple[dict[str, Tensor], Counted, int]:
    """Return the results of all tokens going to rank 0, what was made meanwhile, bytes kept."""
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(rank)
    dtype = torch.bfloat16 if config.fp8 != "off" else torch.float32
    layer = MoELayer(config, groups, init_method=None, dtype=dtype)
    layer.router = ScriptedRouter(*chosen(generator, EXPERTS // groups.ep_size), EXPERTS)
    hidden = torch.randn(TOKENS, config.hidden_size, generator=generator).to(dtype)
    with torch.no_grad():
        for weight in layer.experts.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * weight.shape[2] ** -0.5)
    hidden.requires_grad_()
    with counted():
        layer(hidden).sum().backward()  # what is made once
    for tensor in (hidden, layer.router.probs, *layer.experts.parameters()):
        tensor.grad = None
    if totals:
        layer.experts.totals = Sums(layer)
    cotangent = torch.randn(hidden.shape, generator=generator).to(dtype)
    with as_in_a_graph(graph), counted() as made:
        output = layer(hidden)
        dist.barrier()  # gloo's threads hold what was sent until they have taken further work
        kept = made.now
        output.backward(cotangent)
    found = {"output": output.detach(), "hidden": hidden.grad, "probs": layer.router.probs.grad}
    weights = layer.experts.totals.pair if totals else [p.grad for p in layer.experts.parameters()]
    found |= {f"fc{i}": weight for i, weight in enumerate(weights, start=1)}
    return found, made, kept


def rows_of(made: Counted, config: MoEConfig) -> int:
    """Return the most rows of a matrix that has one for each choice: as wide as an expert.

    With block scales the matrices of padded pre-activations are looked at. Those that are
    transposed for weight gradients have features first.
    """
    ffn, features = config.ffn_hidden_size, set[int]()
    widths = {ffn, 2 * ffn}
    if config.fp8 == "blockwise":
        widths, features = {2 * BLOCK}, {BLOCK, 2 * BLOCK}
    return max(
        size[0]
        for size in made.shapes
        if len(size) == 2 and size[1] in widths and size[0] not in features
    )


def capacity(factor: float) -> int:
    return -(-math.ceil(factor * TOKENS * TOPK) // ALIGNED) * ALIGNED


def factors(ep: int) -> tuple[float, ...]:
    """Return the capacities of a number of ranks: the smallest makes most passes."""
    return FACTORS if ep == 2 else FACTORS[:1]


def cases_of(ep: int) -> list[tuple[dict[str, Any], tuple[dict[str, Any], bool]]]:
    """Return precisions and ways: all pairs of them on two ranks, on four half of the pairs.

    There each precision has one of `alltoall`'s ways, and shapes of a graph and others.
    """
    return [
        (precision, way)
        for (i, precision), (j, way) in product(enumerate(PRECISIONS), enumerate(WAYS))
        if ep == 2 or (i + i // 2 + j + j // 2) % 2 == 0
    ]


def check(ep: int) -> int:
    """Compare precisions and ways with the same without a capacity."""
    groups = create_expert_groups(ParallelConfig(world_size=ep, ep=ep))
    checked, busiest = 0, dist.get_rank() == 0
    for changes, (way, graph) in cases_of(ep):
        config = replace(BASE, **{**changes, **way})
        whole, made, kept = outcome(config, groups, graph)
        if busiest and "overlap" not in way:
            assert rows_of(made, config) == ep * TOKENS * TOPK
        for factor in factors(ep) if config.fp8 == "off" else FACTORS[:1]:
            what = f"{changes}, {way}, {graph}, {factor}"
            found, less, held = outcome(replace(config, rank_capacity=factor), groups, graph)
            for name, value in whole.items():
                assert found[name].dtype == value.dtype, f"{what}: {name}"
                assert error(found[name], value) ** 0.5 <= BOUND[config.fp8], f"{what}: {name}"
            if busiest:
                assert rows_of(less, config) <= capacity(factor) < rows_of(made, config), what
                assert held < kept or config.save == "recompute", what
            checked += 1
    return checked


@pytest.mark.parametrize("ep", [2, 4])
def test_passes_compute_what_all_rows_at_once_do(ep: int) -> None:
    plain = sum(not precision for precision, _ in cases_of(ep))
    cases = plain * len(factors(ep)) + len(cases_of(ep)) - plain
    assert run_ranks(ep, check, ep) == [cases] * ep


def check_totals() -> list[bool]:
    """Totals get what the gradients are otherwise; in one pass all is as without a capacity."""
    groups = create_expert_groups(ParallelConfig(world_size=2, ep=2))
    for changes, (way, graph) in product(PRECISIONS, WAYS):
        config = replace(BASE, **{"save": "recompute", **changes, **way})
        whole, made, _ = outcome(config, groups, graph)
        added, _, _ = outcome(replace(config, rank_capacity=0.25), groups, graph, totals=True)
        for name in ("fc1", "fc2"):
            assert error(added[name] - 1, whole[name]) ** 0.5 <= BOUND[config.fp8], (changes, way)
        same, alike, _ = outcome(replace(config, rank_capacity=2.0), groups, graph)
        assert alike.shapes == made.shapes
        assert abs(alike.most - made.most) <= A_MESSAGE
        for name, value in whole.items():
            assert torch.equal(same[name], value), f"{changes}, {way}: {name}"
    return [bool(value.any()) for value in whole.values()]


def test_totals_get_all_passes_and_one_pass_is_as_without() -> None:
    busy, idle = run_ranks(2, check_totals)
    assert busy == [True] * 5
    assert idle == [True] * 3 + [False] * 2  # its experts have no tokens


def check_room() -> list[tuple[int, int]]:
    """Return bytes kept and the most at one time, in a graph of 4 ranks, by capacity."""
    groups = create_expert_groups(ParallelConfig(world_size=4, ep=4))
    found = []
    for factor in (None, 2.0, 1.0):
        config = replace(BASE, **IN_A_GRAPH, ffn_hidden_size=WIDE, save="fp8", rank_capacity=factor)
        _, made, kept = outcome(config, groups, graph=True, totals=True)
        found.append((kept, made.most))
    return found


def test_the_room_of_a_layer_is_bounded() -> None:
    """Also on ranks without a token: in a graph all have room for the worst case."""
    rows = [4 * TOKENS * TOPK, capacity(2.0), capacity(1.0)]
    in_e4m3, in_fp32 = 2 * WIDE + 4, 4 * 2 * WIDE  # bytes of a row's pre-activations
    for found in run_ranks(4, check_room):
        for both, (more, fewer) in zip(pairwise(found), pairwise(rows), strict=True):
            (kept, most), (less, least) = both
            assert kept - less == (more - fewer) * in_e4m3
            assert most - least > (more - fewer) * in_fp32


def check_without_backward() -> int:
    groups = create_expert_groups(ParallelConfig(world_size=2, ep=2))
    config = replace(BASE, rank_capacity=0.25)
    layer = MoELayer(config, groups)
    layer.router = ScriptedRouter(*chosen(torch.Generator().manual_seed(0), 4), EXPERTS)
    with torch.no_grad(), counted() as made:
        layer(torch.randn(TOKENS, config.hidden_size))
    return rows_of(made, config) if dist.get_rank() == 0 else capacity(0.25)


def test_without_a_backward_it_bounds_too() -> None:
    assert run_ranks(2, check_without_backward) == [capacity(0.25)] * 2


def test_a_rank_without_tokens_of_its_own_makes_no_more_passes_than_others() -> None:
    experts = Experts(replace(BASE, rank_capacity=1.0), ExpertGroups())
    for rows, keep in ((None, Keep("bf16")), (0, Keep("bf16", 0, 1.0)), (9, Keep("bf16", 9, 1.0))):
        experts.rows_in_balance = rows
        assert experts.keep() == keep
    experts.rows_in_balance = 100
    assert experts.keep(share=0.5) == Keep("bf16", 50, 1.0)
    for least, at_once in ((0.0, 16), (0.25, 32), (1.0, 100)):  # of 100 rows
        assert Keep("bf16", 1, least).at_once(100) == at_once
