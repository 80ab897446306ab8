"""A schedule never changes a result: outputs and all gradients are those of `serial`."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from overlap_cases import BASE, SOME, VARIANTS, cases_of, routings, run, sized
from routings import NUM_EXPERTS
from spawn import run_ranks
from symm_mem_cases import MULTICAST_OFF
from tolerance import assert_close

from ep_plugin import ConfigError, MoELayer, ParallelConfig, RoutingConfig, create_expert_groups
from ep_plugin.moe.interfaces import Routing
from ep_plugin.registry import available

# One call of two_batch is serial's; two are in test_two_batch.py.
SCHEDULES = [name for name in available("overlap") if name not in ("serial", "two_batch")]
LAYOUTS = [(2, 2, 1), (4, 4, 1), (4, 2, 2)]  # ranks, ep, etp


def changes_of(
    schedule: str, ranks: int, dedup: bool, variant: dict[str, Any]
) -> list[dict[str, Any]]:
    """Return the settings of `schedule` to try; symm_mem rounds as dispatch_dedup does."""
    if schedule != "chunked":
        return [{"overlap": schedule}]
    numbers = (None,) if variant in VARIANTS else (None, 1, ranks - 1)
    chunked = [{"overlap": schedule, "overlap_chunks": n} for n in numbers]
    own = {"dispatcher": "symm_mem", "dispatch_dedup": False}  # it does so anyway
    blocks = [{**changes, **own} for changes in chunked if dedup]
    return [*chunked, *blocks[::2]]


def check_bits(ranks: int, ep: int, etp: int) -> dict[str, int]:
    """Compare every schedule with one run of `serial`; return how often each was."""
    groups = create_expert_groups(ParallelConfig(world_size=ranks, ep=ep, etp=etp))
    checked = dict.fromkeys(SCHEDULES, 0)
    for case, variant in cases_of(LAYOUTS.index((ranks, ep, etp))):
        for dedup in (False, True):
            config = sized(BASE, dispatch_dedup=dedup, **variant)
            expected = run(config, groups, routings()[case], whole=True)
            for schedule in SCHEDULES:
                for changes in changes_of(schedule, ranks, dedup, variant):
                    found = run(replace(config, **changes), groups, routings()[case], whole=True)
                    for name, value in expected.items():
                        what = f"{case}, {variant}, dedup {dedup}, {changes}: {name}"
                        assert torch.equal(found[name], value), what
                    checked[schedule] += 1
            assert any(value.any() for value in expected.values()) or case == "no tokens at all"
    return checked


@pytest.mark.parametrize(("ranks", "ep", "etp"), LAYOUTS)
def test_whole_numbers_give_equal_bits(ranks: int, ep: int, etp: int) -> None:
    cases = {
        schedule: sum(
            len(changes_of(schedule, ranks, dedup, variant))
            for _, variant in cases_of(LAYOUTS.index((ranks, ep, etp)))
            for dedup in (False, True)
        )
        for schedule in SCHEDULES
    }
    assert all(cases.values())
    assert run_ranks(ranks, check_bits, ranks, ep, etp) == [cases] * ranks


def test_every_variant_meets_every_routing() -> None:
    cases = [(i, case, str(v)) for i in range(len(LAYOUTS)) for case, v in cases_of(i)]
    for variant in map(str, VARIANTS):
        assert {case for _, case, v in cases if v == variant} == set(SOME)
        assert {i for i, _, v in cases if v == variant} == {*range(len(LAYOUTS))}
    for case in SOME:
        assert {i for i, c, v in cases if c == case and v in map(str, VARIANTS)} == {0, 1, 2}


def check_two_legs() -> int:
    """On 2 nodes x 2 ranks: the shared expert beside either leg, and the bits of `alltoall`."""
    groups = create_expert_groups(ParallelConfig(world_size=4, ep=4), ranks_per_node=2)
    for case, ids in routings().items():
        expected = run(BASE, groups, ids, whole=True)
        for schedule in ("serial", "shared_expert"):
            config = replace(BASE, dispatcher="hierarchical", overlap=schedule)
            found = run(config, groups, ids, whole=True)
            for name, value in expected.items():
                assert torch.equal(found[name], value), f"{case}, {schedule}: {name}"
    with pytest.raises(ConfigError, match=r"dispatcher \(hierarchical\) does not"):
        run(replace(config, overlap="chunked"), groups, ids, whole=True)
    return len(routings())


def test_two_legs_give_the_bits_of_one() -> None:
    assert run_ranks(4, check_two_legs) == [9] * 4


ON_ONE_RANK = [torch.tensor([[0, 1], [1, -1]]).repeat(100, 1) for _ in range(4)]
WAYS: list[dict[str, Any]] = [
    {"dispatcher": "alltoall"},
    {"dispatcher": "symm_mem"},
    {"dispatcher": "symm_mem", "overlap": "chunked"},
]


def check_capacity(ep: int, etp: int) -> int:
    """With rows kept of none but few choices, of some, or of all: the bits of all kept."""
    groups = create_expert_groups(ParallelConfig(world_size=ep * etp, ep=ep, etp=etp))
    checked = 0
    some = {case: routings()[case] for case in ("a rank without tokens", "top-4")}
    for case, ids in {"all on one rank": ON_ONE_RANK, **some}.items():
        for variant in ({}, {"fp8": "rowwise"}, {"fp8": "blockwise", "fp8_wgrad": "bf16"}):
            for way in WAYS:
                config = sized(BASE, **variant, **way)
                expected = run(config, groups, ids, whole=True)
                for capacity in (0.01, 1.0, 100.0) if case == "all on one rank" else (0.5,):
                    bounded = replace(config, rank_capacity=capacity)
                    found = run(bounded, groups, ids, whole=True)
                    for name, value in expected.items():
                        what = f"{case}, {variant}, {way}, {capacity}: {name}"
                        assert torch.equal(found[name], value), what
                    checked += 1
    return checked


@pytest.mark.parametrize(("ep", "etp"), [(2, 1), (2, 2)])
def test_what_is_kept_does_not_change_results(ep: int, etp: int) -> None:
    cases = 3 * len(WAYS) * (3 + 2)
    assert run_ranks(ep * etp, check_capacity, ep, etp) == [cases] * ep * etp


def kept_bytes(capacity: float | None, way: dict[str, Any]) -> int:
    """Return the bytes that a layer keeps for the backward."""
    groups = create_expert_groups(ParallelConfig(world_size=2, ep=2))
    config = sized(BASE, activation="swiglu", save="fp8", rank_capacity=capacity, **way)
    kept = 0

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run(config, groups, ON_ONE_RANK, whole=False)
    return kept


@pytest.mark.parametrize("way", WAYS)
def test_what_is_kept_is_bounded(way: dict[str, Any]) -> None:
    """Two ranks of 200 tokens: 600 choices on one of them, and kept are 400 (or twice 208)."""
    whole = run_ranks(2, kept_bytes, None, way)
    bounded = run_ranks(2, kept_bytes, 1.0, way)
    row = 2 * sized(BASE).ffn_hidden_size + 4  # of gate and up in e4m3, and a scale
    beyond = 600 - (416 if "overlap" in way else 400)
    assert [a - b for a, b in zip(whole, bounded, strict=True)] == [beyond * row, 0]


def test_rows_in_balance_are_of_what_a_rank_sends() -> None:
    """Four ranks of tp with the same 10 tokens send 3 each at most, to each of two ranks of etp."""
    routing = Routing(torch.zeros(10, 2, dtype=torch.int64), torch.ones(10, 2), torch.ones(4))
    alone = SimpleNamespace(replicas=None)
    alike = SimpleNamespace(replicas=SimpleNamespace(size=lambda: 4))
    for groups, etp_size, rows in ((alone, 1, 20), (alike, 2, 12)):
        experts = SimpleNamespace(etp_size=etp_size)
        layer: Any = SimpleNamespace(groups=groups, experts=experts)
        assert MoELayer._rows_in_balance(layer, routing) == rows


def test_where_experts_choose_there_is_no_skew_to_bound() -> None:
    routing = RoutingConfig(capacity_factor=1.0, force_expert_choice=True)
    with pytest.raises(ConfigError, match="every expert takes as many tokens; use router='topk'"):
        replace(BASE, router="expert_choice", routing=routing, rank_capacity=1.25)


def check_random(schedule: str) -> int:
    groups = create_expert_groups(ParallelConfig(world_size=4, ep=4))
    checked = 0
    for case in SOME:
        for activation in ("swiglu", "gelu"):
            config = replace(BASE, activation=activation, dispatch_dedup=activation == "gelu")
            expected = run(config, groups, routings()[case], whole=False)
            found = run(replace(config, overlap=schedule), groups, routings()[case], whole=False)
            for name, value in expected.items():
                assert_close(found[name], value.double(), torch.float32, f"{case}: {name}")
            checked += 1
    return checked


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_random_numbers_agree(schedule: str) -> None:
    assert run_ranks(4, check_random, schedule) == [2 * len(SOME)] * 4


def check_on_gpus(schedule: str) -> int:
    device = torch.device("cuda", dist.get_rank())
    groups = create_expert_groups(ParallelConfig(world_size=2, ep=2))
    generator = torch.Generator().manual_seed(9)
    scores = [torch.rand(tokens, NUM_EXPERTS, generator=generator) for tokens in (3001, 1777)]
    ids = [rows.topk(3, dim=1).indices.masked_fill(rows[:, :3] < 0.2, -1) for rows in scores]
    base, hard = replace(BASE, activation="swiglu"), routings()["a rank without tokens"]
    checked = 0
    for variant in ({}, {"fp8": "rowwise"}, *VARIANTS):
        for dedup, chosen in ((False, ids), (True, ids), (True, hard)):
            config = sized(base, dispatch_dedup=dedup, **variant)
            config = replace(config, hidden_size=512, ffn_hidden_size=1024)
            expected = run(config, groups, chosen, whole=False, device=device)
            for changes in changes_of(schedule, 2, dedup, variant):
                changed = replace(config, **changes)
                found = run(changed, groups, chosen, whole=False, device=device)
                for name, value in expected.items():
                    what = f"{variant}, dedup {dedup}, {changes}: {name}"
                    assert torch.equal(found[name], value), what
            checked += 1
    return checked


@pytest.mark.multi_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than 2 GPUs")
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_on_two_gpus_random_numbers_give_equal_bits(
    schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A product's row does not depend on how many rows there are: kernels sum along it alike."""
    for name, value in MULTICAST_OFF.items():
        monkeypatch.setenv(name, value)
    cases = 3 * (2 + len(VARIANTS))
    assert run_ranks(2, check_on_gpus, schedule, backend="nccl") == [cases] * 2
