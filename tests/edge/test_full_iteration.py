"""Whole iterations, or layers, in CUDA graphs: Megatron captures, and our blocks do not wait."""

import argparse
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from loop import LOCAL, MODEL, MOE, NEWEST, OURS, RUN, SCRIPT, SHAPE
from megatron.core.distributed import DistributedDataParallel
from megatron.core.full_cuda_graph import FullCudaGraphWrapper
from megatron.core.transformer import TransformerConfig, cuda_graphs

from ep_plugin.commands.report.events import Run, read_run
from ep_plugin.errors import ConfigError
from ep_plugin.megatron.arguments.captures import captures_layers
from ep_plugin.megatron.arguments.checks import settings_from_args
from ep_plugin.megatron.arguments.parser import add_ep_arguments
from ep_plugin.megatron.arguments.theirs import check as check_theirs
from ep_plugin.megatron.block.adapter import EPMoELayer
from ep_plugin.megatron.block.graphs import check_graphs, end_graphs
from ep_plugin.megatron.block.tracking import RoutingTracker, _accumulate, _Totals
from ep_plugin.megatron.cpu import mode as cpu_mode
from ep_plugin.megatron.seams.captured import _with_our_sums_as_before, _without_copies
from ep_plugin.megatron.settings import EdgeSettings

pytestmark = pytest.mark.megatron
ITERATIONS = 10
WARM = ("--cuda-graph-warmup-steps", "3")
CAPTURE = (
    *("--cuda-graph-impl", "full_iteration", "--no-check-for-nan-in-loss-and-grad"),
    *WARM,
)
CAPTURE_LAYERS = ("--cuda-graph-impl", "transformer_engine", *WARM)
BIASED = (
    *("--moe-router-score-function", "sigmoid", "--moe-router-enable-expert-bias"),
    *("--moe-router-bias-update-rate", "0.01"),
)
PER_LAYER = ("--ep-experts-per-layer", "4,3", "--moe-layer-freq", "[1]*2")  # 3: whole on a rank


def test_sums_stay_where_a_replay_adds_to_them() -> None:
    store: dict[int, torch.Tensor] = {}
    _accumulate(store, 1, torch.tensor([1, 2]))
    place = store[1].data_ptr()
    _accumulate(store, 1, torch.tensor([10, 20]))
    assert store[1].tolist() == [11, 22]
    assert store[1].data_ptr() == place


def test_without_a_gpu_a_graph_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    check_graphs(config, EdgeSettings())
    config.cuda_graph_impl = "local"
    monkeypatch.setattr(cpu_mode, "active", lambda: True)
    with pytest.raises(ConfigError, match=r"\(local\) needs a GPU; use --cuda-graph-impl none"):
        check_graphs(config, EdgeSettings())


def config_of(**fields: Any) -> Any:
    """Stand for a TransformerConfig of any release: names of these fields differ."""
    parallel = {"expert_model_parallel_size": 1, "expert_tensor_parallel_size": None}
    parallel |= {"pipeline_model_parallel_size": 1, "calculate_per_token_loss": False}
    return SimpleNamespace(**{**parallel, "tensor_model_parallel_size": 1, **fields})


ITERATION = (
    {"cuda_graph_impl": "full_iteration", "cuda_graph_modules": []},
    {"cuda_graph_impl": "local", "cuda_graph_scope": ["full_iteration"]},  # until 0.17
)
LAYERS = (
    {"cuda_graph_impl": "transformer_engine", "cuda_graph_modules": []},
    {"cuda_graph_impl": "transformer_engine", "cuda_graph_scope": "full"},  # until 0.17
)
UNTRANSLATED = [  # what Megatron's parser has before its own check
    ({"cuda_graph_impl": "none", "external_cuda_graph": True}, True),
    ({"cuda_graph_impl": "transformer_engine", "cuda_graph_scope_deprecated": ["attn"]}, False),
    ({"cuda_graph_impl": "transformer_engine", "cuda_graph_scope_deprecated": None}, True),
    ({"cuda_graph_impl": "local", "cuda_graph_modules": []}, False),
]
ITERATION_ALONE: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (
        {"calculate_per_token_loss": True, "pipeline_model_parallel_size": 2},
        {},
        "--calculate-per-token-loss over several",
    ),
]
LAYERS_ALONE: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"overlap_moe_expert_parallel_comm": True}, {}, "takes layers apart; use --cuda-graph-impl"),
    ({"cuda_graph_warmup_steps": 0}, {}, "how losses are scaled; use --cuda-graph-warmup-steps 1"),
    (
        {"mtp_num_layers": 2, "mtp_use_repeated_layer": True},
        {},
        "--mtp-use-repeated-layer passes it several times",
    ),
    ({"calculate_per_token_loss": True}, {}, "whole layers cannot hold --calculate-per-token-loss"),
    ({}, {"overlap": "two_batch"}, "takes layers apart; use --cuda-graph-impl none"),
]
REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (
        {"expert_model_parallel_size": 2},
        {"dispatcher": "alltoall"},
        "wait for the host; got alltoall; use --ep-dispatcher symm_mem",
    ),
    (
        {"tensor_model_parallel_size": 2},
        {"dispatcher": "hierarchical"},
        "wait for the host; got hierarchical; use --ep-dispatcher symm_mem",
    ),
    ({"expert_model_parallel_size": 16}, {}, "at most 8 ranks .* got 16"),
    ({"expert_model_parallel_size": 16}, {"dispatcher": "symm_mem"}, "at most 8 ranks .* got 16"),
    (
        {"expert_model_parallel_size": 2, "cuda_graph_warmup_steps": 0},
        {},
        "before any step .* use --cuda-graph-warmup-steps 1",
    ),
    (
        {"expert_model_parallel_size": 2, "micro_batch_size": 1, "eval_micro_batch_size": 4},
        {},
        r"--eval-micro-batch-size \(4\) above .* use --eval-micro-batch-size 1,",
    ),
    *(
        ({"recompute_granularity": "selective", "recompute_modules": ["moe"]}, drawn, said)
        for drawn, said in (
            ({"routing": {"drop_policy": "random"}}, "--ep-drop-policy random draws"),
            ({"routing": {"second_expert": "random"}}, "--ep-second-expert random draws"),
            ({"routing": {"noise": "rsample"}}, "--ep-noise rsample draws"),
            ({"routing": {"force_load_balancing": True}}, "force-load-balancing draws"),
        )
    ),
]
CASES = [
    *((graph, *case) for graph in ITERATION for case in (*REFUSED, *ITERATION_ALONE)),
    *((graph, *case) for graph in LAYERS for case in (*REFUSED, *LAYERS_ALONE)),
]


@pytest.mark.parametrize(("graph", "fields", "settings", "message"), CASES)
def test_what_waits_for_the_host_is_refused(
    graph: dict[str, Any], fields: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_graphs(config_of(**graph, **fields), EdgeSettings(**settings))
    check_graphs(config_of(**graph), EdgeSettings())
    check_graphs(
        config_of(**graph, expert_model_parallel_size=8), EdgeSettings(dispatcher="symm_mem")
    )
    check_graphs(config_of(**graph, expert_model_parallel_size=8), EdgeSettings())


def test_parts_of_megatron_s_moe_layer_are_refused() -> None:
    for modules, said in (([], "whole layers"), (["attn", "moe_router"], "attn, moe_router")):
        config = config_of(cuda_graph_impl="local", cuda_graph_modules=modules)
        with pytest.raises(ConfigError, match=f"of {said} would capture parts of an MoE layer"):
            check_graphs(config, EdgeSettings())
    for others in (["attn"], ["attn", "mlp", "mamba"]):
        check_graphs(config_of(cuda_graph_impl="local", cuda_graph_scope=others), EdgeSettings())


def test_a_mask_of_padding_that_a_captured_layer_would_not_see_is_refused() -> None:
    layer = SimpleNamespace(training=True, config=config_of(**LAYERS[0]))
    with pytest.raises(ConfigError, match="hands no padding_mask to a captured layer"):
        EPMoELayer.forward(layer, torch.zeros(2, 1, 4), padding_mask=torch.zeros(1, 2))  # type: ignore[arg-type]


@pytest.mark.parametrize(("fields", "layers"), UNTRANSLATED)
def test_older_names_say_the_same(fields: dict[str, Any], layers: bool) -> None:
    assert captures_layers(config_of(**fields)) is layers


class _Helper:
    """Stands for Megatron's TECudaGraphHelper."""

    def __init__(self, *model: torch.nn.Module) -> None:
        self.model, self.graphs = model, 0

    def graphs_created(self) -> bool:
        return self.graphs > 0

    def delete_cuda_graphs(self) -> None:
        assert self.graphs > 0
        self.graphs = 0


class _Block(torch.nn.Module):
    """Stands for one of our blocks: it counts in a buffer, and its class has a tracker."""

    tracker = RoutingTracker(lambda *_args, **_groups: None)

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("counted", torch.zeros(3))


def _older(layers: Any, samples: Any, num_warmup_iters: int = 3) -> None:
    """Stands for Transformer Engine's make_graphed_callables."""


def _newer(layers: Any, samples: Any, clone_param_grads_on_return: bool = True) -> None:
    """Stands for that of a newer release."""


@pytest.mark.parametrize("engine", [_older, _newer])
@pytest.mark.parametrize("wrapped", [(True,), (True, True), (False,), (True, False)])
def test_gradients_that_ddp_takes_at_once_are_not_copied_first(
    engine: Any, wrapped: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_graphs, "make_graphed_callables", engine, raising=False)
    ddp = DistributedDataParallel.__new__(DistributedDataParallel)
    helper = _Helper(*(ddp if whether else torch.nn.Identity() for whether in wrapped))
    made, samples = {"_order": [1, -1]}, ((torch.zeros(2),),)
    spared = engine is _newer and all(wrapped)
    expected = {**made, **({"clone_param_grads_on_return": False} if spared else {})}
    found = _without_copies(lambda _: (samples, dict(made)), helper)
    assert found == (samples, expected)
    asked = {"clone_param_grads_on_return": True}  # Megatron's own word stays
    assert _without_copies(lambda _: (samples, dict(asked)), helper) == (samples, asked)


def test_what_is_counted_while_layers_are_captured_counts_for_nothing() -> None:
    block, other = _Block(), torch.nn.BatchNorm1d(3)
    totals = _Totals()
    _Block.tracker._totals[("model", 0)] = totals  # type: ignore[index]
    block.counted += 5
    _accumulate(totals.rows, 1, torch.tensor([1, 2]))
    places = [block.counted.data_ptr(), totals.rows[1].data_ptr()]

    def capture(helper: Any) -> str:
        block.counted += 7
        other.running_mean += 1  # Megatron's own
        _accumulate(totals.rows, 1, torch.tensor([10, 20]))
        _accumulate(totals.rows, 2, torch.tensor([3, 4]))
        helper.graphs = 2
        return "made"

    helper = _Helper(torch.nn.Sequential(block, other))
    assert _with_our_sums_as_before(_Block, capture, helper) == "made"
    assert block.counted.tolist() == [5, 5, 5]
    assert other.running_mean.tolist() == [1, 1, 1]
    assert {row: values.tolist() for row, values in totals.rows.items()} == {1: [1, 2], 2: [0, 0]}
    assert places == [block.counted.data_ptr(), totals.rows[1].data_ptr()]
    end_graphs()
    end_graphs()
    assert helper.graphs == 0


@pytest.mark.skipif(not NEWEST, reason="the flags of 0.19")
def test_megatron_s_own_flags_are_read() -> None:
    from megatron.training import arguments

    parser = add_ep_arguments(arguments.add_megatron_arguments(argparse.ArgumentParser()))
    flags = [*MODEL, "--num-experts", "4"]
    args = parser.parse_args([*flags, "--cuda-graph-impl", "local", "--cuda-graph-modules", "moe"])
    with pytest.raises(ConfigError, match=r"\(local\) of moe would"):
        check_graphs(args, settings_from_args(args))
    args = parser.parse_args([*flags, "--moe-expert-rank-capacity-factor", "1.5"])
    with pytest.raises(ConfigError, match=r"rank-capacity-factor \(1\.5\) drops the tokens"):
        check_theirs(args)


def test_graphs_are_freed_before_nccl_s_groups_wait_for_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    freed = []
    graphs = {"training": SimpleNamespace(reset=lambda: freed.append("training"))}
    monkeypatch.setattr(FullCudaGraphWrapper, "cuda_graph", {**graphs, "validation": None})
    end_graphs()
    end_graphs()
    assert freed == ["training"]
    assert FullCudaGraphWrapper.cuda_graph == {"training": None, "validation": None}


def train_on_gpus(folder: Path, *flags: str, ep: int = 2, ranks: int = 2) -> Run:
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(ranks)),
        *(*OURS, SCRIPT, *SHAPE, *RUN, *MOE, *LOCAL, "--bf16"),
        "--use-distributed-optimizer",
        *("--expert-model-parallel-size", str(ep)),
        *("--train-iters", str(ITERATIONS), "--tensorboard-dir", str(folder), *flags),
    ]
    done = subprocess.run(
        command,
        env={**os.environ, "NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"},
        capture_output=True,
        text=True,
        timeout=240,  # a graph that is not freed keeps a rank from ending
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.count("auto takes --ep-dispatcher symm_mem") == (ep > 1)
    return read_run(folder)


def equal(run: Run, other: Run, tag: str, bound: float) -> None:
    pairs = zip(run.series(tag), other.series(tag), strict=True)
    seen = [
        (iteration, value == pytest.approx(expected, rel=bound))
        for (iteration, value), (_, expected) in pairs
    ]
    assert seen == [(iteration, True) for iteration in range(1, ITERATIONS + 1)], tag


ON_GPUS: list[tuple[str, ...]] = [
    (),
    ("--ep-overlap", "serial"),
    ("--ep-fp8", "rowwise"),
    PER_LAYER,
]


@pytest.mark.multi_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
def test_layers_of_other_degrees_train_as_without_expert_parallelism(tmp_path: Path) -> None:
    spread = train_on_gpus(tmp_path / "spread", *PER_LAYER)
    whole = train_on_gpus(tmp_path / "whole", *PER_LAYER, ep=1)
    for tag, bound in (("lm loss", 2e-3), ("load_balancing_loss", 1e-2), ("grad-norm", 5e-2)):
        equal(spread, whole, tag, bound)


GRAPHS = {"iterations": CAPTURE, "layers": CAPTURE_LAYERS}
NO_ENGINE = find_spec("transformer_engine") is None


def same_training(folder: Path, graph: str, *flags: str, ranks: int) -> None:
    if graph == "layers" and NO_ENGINE:
        pytest.skip("no Transformer Engine")
    launched = train_on_gpus(folder / "launched", *flags, ep=ranks, ranks=ranks)
    captured = train_on_gpus(folder / "captured", *flags, *GRAPHS[graph], ep=ranks, ranks=ranks)
    for tag, bound in (("lm loss", 2e-3), ("load_balancing_loss", 1e-2), ("grad-norm", 5e-2)):
        equal(captured, launched, tag, bound)
    loads = [captured.series(f"ep/tokens_per_expert/layer_1/expert_{e}") for e in range(4)]
    expected = [launched.series(f"ep/tokens_per_expert/layer_1/expert_{e}") for e in range(4)]
    assert len(loads[0]) == ITERATIONS
    for values, others in zip(zip(*loads, strict=True), zip(*expected, strict=True), strict=True):
        assert sum(value for _, value in values) == pytest.approx(1)
        for (_, value), (_, other) in zip(values, others, strict=True):
            assert value == pytest.approx(other, abs=0.05)


@pytest.mark.multi_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("flags", ON_GPUS)
def test_captured_steps_train_as_launched_ones(
    tmp_path: Path, flags: tuple[str, ...], graph: str
) -> None:
    same_training(tmp_path, graph, *flags, ranks=2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("flags", [(), ("--ep-fp8", "rowwise"), BIASED])
def test_on_one_gpu_too(tmp_path: Path, flags: tuple[str, ...], graph: str) -> None:
    same_training(tmp_path, graph, *flags, ranks=1)
