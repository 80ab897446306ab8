"""Dispatcher symm_mem: what it sends, its buffer and its kernels. Its laws: test_dispatcher.py."""

import os
import socket
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import get_args
from unittest.mock import patch

import pytest
import symm_mem_cases as cases
import torch
import torch.distributed as dist
from spawn import run_ranks

from ep_plugin import (
    ConfigError,
    ExpertGroups,
    MoEConfig,
    MoELayer,
    ParallelConfig,
    RoutingConfig,
    create_expert_groups,
)
from ep_plugin.moe.config import Fp8
from ep_plugin.moe.dispatcher import symm_mem
from ep_plugin.registry import resolve

NUM_GPUS = torch.cuda.device_count()


@pytest.mark.parametrize(("ranks", "ep", "etp"), [(2, 2, 1), (4, 2, 2), (4, 2, 1), (8, 8, 1)])
def test_equals_alltoall_with_dedup_to_the_bit(ranks: int, ep: int, etp: int) -> None:
    assert run_ranks(ranks, cases.agree, ep, etp, "cpu") == [2 * len(cases.CASES)] * ranks


@pytest.mark.parametrize("again", [False, True], ids=["", "recomputed"])
def test_layers_share_one_buffer(again: bool) -> None:
    run_ranks(2, cases.layers_share, "cpu", again)


def test_the_buffer_grows_on_all_ranks_alike() -> None:
    sizes = run_ranks(2, cases.grows, "cpu")
    assert sizes[0] == sizes[1]
    first, second, third = sizes[0]
    assert first < second == third


def files_left(folder: str) -> list[str]:
    tempfile.tempdir = folder
    cases.grows("cpu")
    dist.barrier()
    return os.listdir(folder)


def test_shared_memory_has_no_name_left(tmp_path: Path) -> None:
    assert run_ranks(2, files_left, str(tmp_path)) == [[], []]


def refusal_on_hosts() -> str:
    host = f"host{dist.get_rank() // 2}"
    with patch.object(socket, "gethostname", lambda: host), pytest.raises(ConfigError) as error:
        resolve("dispatcher", "symm_mem")(cases.CONFIG, cases.make_groups(4))
    return str(error.value)


def test_rows_that_nobody_wrote_are_no_one_s() -> None:
    for ranks in (2, 4):
        assert run_ranks(ranks, cases.allows_for_all, "cpu") == [len(cases.CASES)] * ranks


@pytest.mark.parametrize("fp8", get_args(Fp8))
def test_chunks_of_nobody_are_no_one_s(fp8: Fp8) -> None:
    assert run_ranks(2, cases.chunks_allow_for_all, "cpu", fp8) == [5, 5]


def test_the_exchange_of_chunks_goes_there_and_back() -> None:
    assert run_ranks(4, cases.goes_there_and_back, "cpu") == [11, 14, 17, 20]


def large_group() -> str:
    """Its buffers have room for what comes, and it is not captured."""
    with patch.object(symm_mem, "GRAPH_RANKS", 1):
        cases.agree(2, 1, "cpu")
        sizes = cases.grows("cpu")
        assert sizes[0] < sizes[1] == sizes[2]
        dispatcher = cases.both(cases.make_groups(2))[1]
        captured = patch.object(symm_mem, "_captured", lambda _: True)
        with captured, pytest.raises(ConfigError) as refused:
            dispatcher._plan(cases.random_ids("random", 4, 2, seed=1))  # type: ignore[attr-defined]
    return str(refused.value)


def test_a_large_group_has_room_for_what_comes() -> None:
    for refusal in run_ranks(2, large_group):
        assert "at most 1 ranks of ep and etp; got 2; run the step without" in refusal


def graph_with_more_tokens() -> str:
    dispatcher = cases.both(cases.make_groups(2))[1]
    ids = cases.random_ids("random", 4, 2, seed=1)
    with patch.object(symm_mem, "_captured", lambda _: True), pytest.raises(ConfigError) as refused:
        dispatcher._plan(ids)  # type: ignore[attr-defined]
    return str(refused.value)


def test_a_graph_needs_a_step_before_it() -> None:
    refusals = run_ranks(2, graph_with_more_tokens)
    assert "an earlier call (0 on any rank); got 4; first run a step" in refusals[0]
    assert "got 7" in refusals[1]


def test_several_hosts_are_refused_on_every_rank() -> None:
    refusals = run_ranks(4, refusal_on_hosts)
    assert len(set(refusals)) == 1
    assert "the 4 are on 2: host0, host1; use dispatcher='alltoall'" in refusals[0]


def test_without_groups_is_refused() -> None:
    with pytest.raises(ConfigError, match="use dispatcher='local'"):
        resolve("dispatcher", "symm_mem")(cases.CONFIG, ExpertGroups())


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_kernels_equal_their_twins_in_triton_s_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).parents[1] / "helpers" / "peers_cases.py"), "cpu"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.gpu
@pytest.mark.skipif(NUM_GPUS < 1, reason="no GPU")
def test_kernels_equal_their_twins_on_a_gpu() -> None:
    import peers_cases

    peers_cases.check_all("cuda", tokens=(0, 37, 1000), ranks=(2, 8), widths=(1, 8, 7168))


def on_gpus() -> int:
    cases.layers_share("cuda", again=True)
    small, large = cases.grows("cuda")[:2]
    assert small < large
    return cases.agree(2, 1, "cuda") + cases.agree(2, 1, "cuda", hidden_size=2048, tokens=500)


@pytest.mark.gpu
@pytest.mark.skipif(NUM_GPUS < 1, reason="no GPU")
def test_two_ranks_on_one_gpu_equal_alltoall(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch lets ranks share a GPU if told so; NCCL does not, so gloo carries the counts."""
    monkeypatch.setenv("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")
    for name, value in cases.MULTICAST_OFF.items():
        monkeypatch.setenv(name, value)
    assert run_ranks(2, on_gpus, uses_gpu=True) == [4 * len(cases.CASES)] * 2


def replays_equal_steps(fp8: Fp8, overlap: str) -> int:
    """A layer on all GPUs, forward and backward, as a graph that waits for no host."""
    device = torch.device("cuda", dist.get_rank())
    config = MoEConfig(
        hidden_size=256, ffn_hidden_size=128, num_experts=8, dispatcher="symm_mem",
        routing=RoutingConfig(topk=2), fp8=fp8, deterministic=True, overlap=overlap,
    )  # fmt: skip
    torch.manual_seed(3)
    ranks = dist.get_world_size()
    groups = create_expert_groups(ParallelConfig(world_size=ranks, ep=ranks))
    layer = MoELayer(config, groups, device=device, dtype=torch.bfloat16)
    torch.manual_seed(11 + dist.get_rank())
    inputs = [torch.randn(96, 256, device=device).bfloat16() for _ in range(3)]
    tokens = inputs[0].clone().requires_grad_()

    def step() -> list[torch.Tensor]:
        for tensor in (tokens, *layer.parameters()):
            tensor.grad = None
        output = layer(tokens)
        torch.autograd.backward(output, torch.ones_like(output))
        return [output, *(tensor.grad for tensor in (tokens, *layer.parameters()))]

    wanted = []
    for values in inputs:
        tokens.data.copy_(values)
        wanted.append([tensor.detach().clone() for tensor in step()])
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        captured = step()
    for number, values in enumerate(inputs):
        tokens.data.copy_(values)
        graph.replay()
        cases.assert_equal(captured, wanted[number], f"{fp8}, step {number}")
    return len(wanted)


@pytest.mark.multi_gpu
@pytest.mark.parametrize("overlap", ["serial", "chunked"])
@pytest.mark.parametrize("fp8", get_args(Fp8))
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_graph_s_replays_equal_steps(
    ranks: int, fp8: Fp8, overlap: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if ranks > NUM_GPUS:
        pytest.skip(f"fewer than {ranks} GPUs")
    for name, value in cases.MULTICAST_OFF.items():
        monkeypatch.setenv(name, value)
    assert run_ranks(ranks, replays_equal_steps, fp8, overlap, backend="nccl") == [3] * ranks


@pytest.mark.multi_gpu
@pytest.mark.skipif(NUM_GPUS < 2, reason="fewer than two GPUs")
def test_two_gpus_equal_alltoall(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in cases.MULTICAST_OFF.items():
        monkeypatch.setenv(name, value)
    assert run_ranks(2, on_gpus, backend="nccl") == [4 * len(cases.CASES)] * 2
