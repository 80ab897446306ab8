"""What `auto` chooses: held against every measured row, settings that must act, and other ranks."""

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from spawn import run_ranks

from ep_plugin import (
    ConfigError,
    MoEConfig,
    MoELayer,
    ParallelConfig,
    RoutingConfig,
    create_expert_groups,
)
from ep_plugin.commands.bench.over_ranks import DISPATCHERS
from ep_plugin.commands.bench.shapes import SHAPES, Shape
from ep_plugin.moe.auto import Place, settle, wants_shared_memory
from ep_plugin.moe.config import GRAPH_RANKS
from ep_plugin.moe.dispatcher import _trial
from ep_plugin.moe.dispatcher._shared_buffer import SharedBuffer
from ep_plugin.moe.experts.fits import check_capturable
from ep_plugin.moe.groups import ExpertGroups
from ep_plugin.moe.kernels import peers_torch

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
WITHIN = 1.03  # of the fastest
CPU = torch.device("cpu")
SIZES = {"hidden_size": 64, "ffn_hidden_size": 64, "num_experts": 8}
Ways = dict[tuple[str, str], float]  # dispatcher and schedule, as `bench overlap` names them -> ms


def config_of(shape: Shape, ranks: int, backend: str, graph: bool) -> MoEConfig:
    recipe: Any = backend.partition("+")[2] or "off"
    return MoEConfig(
        hidden_size=shape.hidden,
        ffn_hidden_size=shape.ffn,
        num_experts=shape.experts * ranks,
        routing=RoutingConfig(topk=shape.topk),
        fp8=recipe,
        in_graph=graph,
        tokens=shape.tokens,
    )


def way_of(config: MoEConfig) -> tuple[str, str]:
    dispatcher = f"{config.dispatcher}{'+dedup' if config.dispatch_dedup else ''}"
    assert dispatcher in DISPATCHERS
    return dispatcher, config.overlap


def measured() -> Iterator[tuple[MoEConfig, int, Ways]]:
    """Yield what was timed in turn in one process: the layer, its ranks, each way."""
    for path in sorted(RESULTS.glob("*gpus*.json")):
        ways: dict[tuple[Any, ...], Ways] = defaultdict(dict)
        for row in json.loads(path.read_text()):
            if row["bench"] != "overlap" or not row["backend"].startswith("ep_plugin"):
                continue
            key = row["shape"], row["ep"], row["backend"], row["graph"]
            run = *key, row["routing"], row["op"], row["date"]
            ways[run][row["dispatcher"], row["schedule"]] = row["ms"]
        for (shape, ranks, backend, graph, *_), times in ways.items():
            yield config_of(SHAPES[shape], ranks, backend, graph), ranks, times


@pytest.mark.parametrize("shares", [True, False], ids=["symm_mem", "without symm_mem"])
def test_nothing_that_was_measured_is_much_faster_than_what_is_chosen(shares: bool) -> None:
    """By the median over starts: one way's times differ by some percent from start to start."""
    ratios: dict[tuple[MoEConfig, int, tuple[str, str]], list[float]] = defaultdict(list)
    for config, ranks, times in measured():
        chosen = way_of(settle(config, Place(ranks, cuda=True, shares_memory=lambda: shares)))
        for way, ms in times.items():
            if chosen in times and (shares or way[0] != "symm_mem"):
                ratios[config, ranks, way].append(times[chosen] / ms)
    assert len(ratios) > 40
    slower = {key: found for key, found in ratios.items() if median(found) > WITHIN}
    assert not slower


PLACES = [
    Place(ranks, cuda, replicated, lambda shares=shares: shares)
    for ranks, cuda, replicated, shares in product((1, 2, 8, 64), *[(False, True)] * 3)
]
SET: tuple[dict[str, Any], ...] = (
    {},
    {"dispatch_dedup": True},
    {"dispatch_dedup": False},
    {"check_splits": "always"},
    {"fp8": "rowwise", "dispatch_dtype": "fp8"},
    {"overlap": "chunked"},
    {"overlap": "chunked", "overlap_chunks": 1},
    {"overlap": "shared_expert"},
    {"overlap": "two_batch"},
    {"dispatcher": "symm_mem", "comm_sms": 8},
    {"dispatcher": "hierarchical"},
    {"dispatcher": "users.dispatcher"},
    {"bias": True},
    {"in_graph": True},
    {"router": "users.router"},
)


@pytest.mark.parametrize("given", SET, ids=str)
def test_what_is_set_beside_it_stays_and_acts(given: dict[str, Any]) -> None:
    config = MoEConfig(**SIZES, **given)
    for place in PLACES:
        found = settle(config, place)
        assert "auto" not in (found.dispatcher, found.overlap)
        assert all(getattr(found, name) == value for name, value in given.items())
        assert settle(found, place) == found
        about_alltoall = {"dispatch_dedup", "check_splits", "dispatch_dtype"} & set(given)
        if about_alltoall and place.ranks > 1:
            assert found.dispatcher == "alltoall"
        if found.overlap == "chunked" and "overlap" not in given:
            assert not found.bias
            assert not place.replicated
        if not place.cuda and not given:
            plain = ("local" if place.ranks == 1 else "alltoall", "serial", None)
            assert (found.dispatcher, found.overlap, found.dispatch_dedup) == plain


def test_where_the_tokens_are_unknown_nobody_knows_how_large_buffers_become() -> None:
    config, place = MoEConfig(**SIZES), Place(2, cuda=True)
    assert not wants_shared_memory(config, place)
    assert wants_shared_memory(replace(config, tokens=64), place)
    assert wants_shared_memory(replace(config, in_graph=True), place)


def test_more_ranks_than_a_graph_takes_do_not_share_memory_in_one() -> None:
    config = MoEConfig(**SIZES, in_graph=True)
    assert wants_shared_memory(config, Place(GRAPH_RANKS, cuda=True))
    assert not wants_shared_memory(config, Place(GRAPH_RANKS + 1, cuda=True))


def reasons(num_bytes: int, how: str) -> list[str | None]:
    """Try twice; `how` breaks something on rank 1 alone."""
    groups = create_expert_groups(ParallelConfig(world_size=4, ep=2))
    real, store = SharedBuffer.reserve, peers_torch.push_rows

    def reserve(buffer: SharedBuffer, size: int, device: torch.device) -> Any:
        found = real(buffer, size, device)
        if how == "fails" and torch.distributed.get_rank() == 1:
            raise RuntimeError("no memory\nand a trace")
        return found

    def push_rows(*args: Any) -> None:
        if how == "stores" and torch.distributed.get_rank() == 1:
            raise ValueError("no kernel")
        if how != "loses" or torch.distributed.get_rank() != 1:
            store(*args)

    def hosts() -> str:
        return f"host{torch.distributed.get_rank() if how == 'hosts' else 0}"

    with (
        patch.object(SharedBuffer, "reserve", reserve),
        patch.object(peers_torch, "push_rows", push_rows),
        patch("socket.gethostname", hosts),
    ):
        return [_trial.why_not(groups, CPU, num_bytes) for _ in range(2)]


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("works", None),
        ("fails", "RuntimeError: no memory"),
        ("stores", "ValueError: no kernel"),  # and the other ranks do not wait for this one
        ("loses", "from ranks [0, 1] came [0, "),
        ("hosts", "dispatcher 'symm_mem' needs the ranks of ep and etp on one host"),
    ],
)
def test_all_ranks_are_told_the_same(how: str, expected: str | None) -> None:
    """Those of the other expert group too, though they had no trouble."""
    found = {reason for each in run_ranks(4, reasons, 1 << 16, how) for reason in each}
    assert len(found) == 1
    (reason,) = found
    assert reason == expected or (expected is not None and str(reason).startswith(expected))


@pytest.mark.parametrize(
    ("num_bytes", "expected"),
    [
        (8 << 30, None),  # a tenth of the GPU's memory
        ((8 << 30) + 1, "its buffers take 8.0 GiB, more than 10% of the GPU's 80"),
    ],
)
def test_the_buffers_take_a_tenth_of_the_memory_at_most(
    num_bytes: int, expected: str | None
) -> None:
    gpu = SimpleNamespace(total_memory=80 << 30)
    with (
        patch("torch.cuda.get_device_properties", lambda _: gpu),
        patch.object(_trial, "shared_buffer"),
        patch.object(_trial, "_SymmetricMemory"),
    ):
        assert _trial._missing(ExpertGroups(), torch.device("cuda"), num_bytes) == expected


def layer_in_a_graph(works: bool) -> tuple[str, str]:
    """Pretend that the CPU is a GPU; return what the layer took, or the sentence."""
    groups = create_expert_groups(ParallelConfig(world_size=2, ep=2))
    config = MoEConfig(**SIZES, in_graph=True, tokens=16)

    def place(ranks: int, cuda: bool, **more: Any) -> Place:
        return Place(ranks, True, **more)

    refused = patch.object(_trial, "_missing", lambda *_: None if works else "no NVLink")
    with (
        refused,
        patch("ep_plugin.moe.layer.Place", place),
        patch("ep_plugin.moe.experts.experts.check_capturable"),
    ):
        try:
            layer = MoELayer(config, groups)
        except ConfigError as error:
            return "refused", str(error)
        layer(torch.randn(16, 64)).sum().backward()
        return layer.config.dispatcher, layer.config.overlap


def test_a_layer_takes_it() -> None:
    assert run_ranks(2, layer_in_a_graph, True) == [("symm_mem", "chunked")] * 2
    for kind, sentence in run_ranks(2, layer_in_a_graph, False):
        assert kind == "refused"
        assert sentence == (
            "a CUDA graph needs dispatcher='symm_mem', which does not work here: no NVLink; run "
            "the step without a CUDA graph"
        )


@pytest.mark.parametrize(
    ("given", "dtype", "capturable"),
    [
        ({}, torch.bfloat16, True),
        ({"gemm": "torch_grouped"}, torch.bfloat16, True),
        ({"gemm": "loop"}, torch.bfloat16, False),
        ({"gemm": "my_moe.gemm"}, torch.bfloat16, False),
        ({}, torch.float32, False),
        ({"hidden_size": 60}, torch.bfloat16, False),
        ({"ffn_hidden_size": 60, "activation": "gelu"}, torch.bfloat16, False),
        ({"fp8": "rowwise"}, torch.float32, True),
        ({"fp8": "rowwise", "fp8_wgrad": "bf16", "gemm": "loop"}, torch.bfloat16, False),
        ({"fp8": "rowwise", "fp8_wgrad": "bf16"}, torch.bfloat16, True),
    ],
    ids=str,
)
def test_products_that_wait_for_the_host_are_refused_in_a_graph(
    given: dict[str, Any], dtype: torch.dtype, capturable: bool
) -> None:
    config = MoEConfig(**{**SIZES, **given}, in_graph=True)
    gpu = torch.device("cuda")
    check_capturable(replace(config, in_graph=False), 1, gpu, dtype)
    if capturable:
        check_capturable(config, 1, gpu, dtype)
    else:
        with pytest.raises(
            ConfigError, match=r"waits? for the host.*; use .* without a CUDA graph"
        ):
            check_capturable(config, 1, gpu, dtype)


def beside_plain(graph: bool) -> tuple[str, str, float]:
    """Return what `auto` took on GPUs, and how far its output is from that of `alltoall`."""
    device = torch.device("cuda", torch.cuda.current_device())
    ranks = torch.distributed.get_world_size()
    groups = create_expert_groups(ParallelConfig(world_size=ranks, ep=ranks))
    config = MoEConfig(hidden_size=256, ffn_hidden_size=128, num_experts=8, tokens=64)
    layers = [
        MoELayer(each, groups, device=device, dtype=torch.bfloat16)
        for each in (
            replace(config, in_graph=graph),
            replace(config, dispatcher="alltoall", overlap="serial"),
        )
    ]
    layers[0].load_state_dict(layers[1].state_dict())
    hidden = torch.randn(64, 512, device=device).bfloat16()[:, :256]  # a view, not contiguous
    found, wanted = (layer(hidden).float() for layer in layers)
    chosen = layers[0].config
    return chosen.dispatcher, chosen.overlap, float((found - wanted).norm() / wanted.norm())


@pytest.mark.multi_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
@pytest.mark.parametrize(("graph", "overlap"), [(False, "serial"), (True, "chunked")])
def test_on_gpus_of_one_host_it_takes_their_memory(graph: bool, overlap: str) -> None:
    for taken, order, error in run_ranks(2, beside_plain, graph, backend="nccl", uses_gpu=True):
        assert (taken, order) == ("symm_mem", overlap)
        assert error < 0.01


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_while_a_graph_is_captured_a_product_that_waits_is_refused() -> None:
    config = MoEConfig(hidden_size=60, ffn_hidden_size=64, num_experts=4)
    layer = MoELayer(config, device="cuda", dtype=torch.bfloat16)
    hidden = torch.randn(16, 60, device="cuda").bfloat16()
    layer(hidden)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(ConfigError, match="multiples of 8"), torch.cuda.graph(graph):
        layer(hidden)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("fp8", ["off", "rowwise", "blockwise"])
def test_hidden_states_may_lie_in_memory_in_any_way(fp8: Any) -> None:
    config = MoEConfig(hidden_size=256, ffn_hidden_size=256, num_experts=4, fp8=fp8)
    layer = MoELayer(config, device="cuda", dtype=torch.bfloat16)
    plain = torch.randn(24, 3, 256, device="cuda").bfloat16()
    wide = torch.cat([plain, plain * torch.nan], dim=2)[..., :256]
    across = plain.transpose(0, 2).contiguous().transpose(0, 2)
    batch_first = plain.transpose(0, 1).contiguous().transpose(0, 1)
    results = []
    for hidden in (plain, wide, across, batch_first):
        leaf = hidden.detach().requires_grad_()
        output = layer(leaf)
        output.sum().backward()  # its gradient is one number, expanded
        results.append((output, leaf.grad))
    for output, grad in results[1:]:
        assert torch.equal(output, results[0][0])
        assert torch.equal(grad, results[0][1])
