"""The memory model: parameters of all ranks together, bytes kept as measured, what spreads how.

`tests/project/test_recipes.py` compares parameters of one rank with Megatron's models.
"""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ep_plugin.cli import main
from ep_plugin.commands.bench.shapes import SHAPES
from ep_plugin.commands.plan.memory import Memory, kept_by_experts, split_layers, stage_memory
from ep_plugin.commands.plan.network import Traffic, received
from ep_plugin.errors import ConfigError
from ep_plugin.moe.parallel import ParallelConfig
from ep_plugin.presets import layer_params, load, total_params

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "layer_h100.json"
MIXTRAL = load("mixtral-8x7b")


def memory(world_size: int = 32, pp: int = 4, **settings: int) -> list[Memory]:
    degrees = {"ep": 8, "etp": 1, **settings}
    parallel = ParallelConfig(world_size=world_size, pp=pp, **degrees)
    return stage_memory(MIXTRAL, parallel, split_layers(32, pp), seq_length=4096)


@pytest.mark.parametrize(
    "name", ["mixtral-8x7b", "qwen3-30b-a3b", "deepseek-v3", "ds-1.3b-prmoe-64-128", "switch-nano"]
)
def test_stages_and_ranks_together_hold_the_model(name: str) -> None:
    """Routed parameters times the expert-parallel ranks, dense ones once: the preset's total."""
    preset = load(name)
    decoder = replace(preset.model, encoder_experts=())
    routing = replace(preset.routing, expert_bias=False)  # a buffer, not a parameter
    expected = total_params(replace(preset, model=decoder, routing=routing))
    count = len(decoder.experts)
    pp = 1 if decoder.tied else 3  # a tied matrix is on two stages
    parallel = ParallelConfig(world_size=4 * pp, pp=pp, ep=4)
    stages = stage_memory(preset, parallel, split_layers(count, pp))
    assert sum(stage.dense_params + 4 * stage.expert_params for stage in stages) == expected


def test_experts_keep_what_was_measured_on_an_h100() -> None:
    rows = [
        row
        for row in json.loads(RESULTS.read_text())
        if (row["backend"], row["precision"], row["routing"]) == ("ep_plugin", "bf16", "balanced")
    ]
    assert {row["shape"] for row in rows} >= {"dsv3", "q3-235b", "q3-30b-ep8", "q3-30b", "mixtral"}
    for row in rows:
        shape = SHAPES[row["shape"]]
        kept = kept_by_experts(shape.rows, shape.ffn, "swiglu") / 2**20
        assert kept == pytest.approx(row["saved_mib"], rel=0.03), row["shape"]


@pytest.mark.parametrize("dedup", [False, True])
def test_rows_received_are_those_of_sampled_routings(dedup: bool) -> None:
    tokens, topk, experts, ep = 20000, 4, 32, 8
    generator = torch.Generator().manual_seed(0)
    ids = torch.rand(tokens, experts, generator=generator).topk(topk, dim=1).indices
    ranks = (ids // (experts // ep)).tolist()
    sent = sum(len(set(chosen)) if dedup else len(chosen) for chosen in ranks)
    found = received(Traffic(tokens, topk, 1, experts), ep, dedup)
    assert found == pytest.approx(sent, rel=0.01)  # as many as a rank sends, itself among them


def test_a_pyramid_is_spread_by_each_layer_s_experts() -> None:
    """32 and 64 experts on 64 ranks, as published: one expert of each layer on a rank."""
    preset = load("ds-350m-prmoe-32-64")
    one = sum(
        layer_params(preset.model, count).experts // count for count in (32,) * 10 + (64,) * 2
    )
    for world_size, edp in ((64, 1), (128, 2)):
        parallel = ParallelConfig(world_size=world_size, ep=64)
        (held,) = stage_memory(preset, parallel, [24])
        assert held.expert_params == one
        assert parallel.edp == edp
        assert held.optimizer == 12 * held.dense_params // world_size + 12 * one // edp
    with pytest.raises(ConfigError, match=r"num_experts \(64\) must be divisible by ep \(128\)"):
        stage_memory(preset, ParallelConfig(world_size=128, ep=128), [24])


def test_what_is_spread_over_whom() -> None:
    """Twice the GPUs: half the optimizer. Twice tp: half the matrices. Twice pp: half the rest."""
    one, more = memory()[1], memory(world_size=64)[1]
    assert more.weights == one.weights
    assert more.optimizer == one.optimizer // 2
    assert more.activations == one.activations
    assert one.expert_params == 8 * 3 * 4096 * 14336
    sharded = memory(world_size=64, tp=2)[1]
    assert sharded.expert_params == one.expert_params
    attention, replicated = 2 * 4096 * (4096 + 1024), 2 * 4096 + 8 * 4096
    assert one.dense_params == 8 * (attention + replicated)
    assert sharded.dense_params == 8 * (attention // 2 + replicated)
    assert memory(world_size=64, pp=8)[1].expert_params == one.expert_params // 2


def test_stages_before_keep_more_micro_batches_and_recomputing_keeps_inputs() -> None:
    first, second, *_ = memory()
    assert first.activations * 3 == second.activations * 4
    parallel = ParallelConfig(world_size=32, pp=4, ep=8, etp=1)
    layers = split_layers(32, 4)
    again = stage_memory(MIXTRAL, parallel, layers, seq_length=4096, recompute=True)[0]
    inputs = 4 * 8 * 4096 * 4096 * 2  # micro-batches, layers, tokens, hidden, bytes
    assert again.activations == inputs + first.activations // 32


def test_layers_are_split_evenly_and_the_rest_to_the_middle() -> None:
    assert split_layers(61, 4) == [15, 16, 15, 15]
    assert split_layers(94, 8) == [11, 12, 12, 12, 12, 12, 12, 11]
    assert split_layers(32, 4) == [8] * 4


def test_layers_that_are_not_the_model_s_are_refused() -> None:
    parallel = ParallelConfig(world_size=32, pp=4, ep=8)
    with pytest.raises(ConfigError, match=r"the 32 layers of mixtral-8x7b in 4 stages; got \[8\]"):
        stage_memory(MIXTRAL, parallel, [8])
    with pytest.raises(ConfigError, match=r"num_experts \(8\) must be divisible by ep \(16\)"):
        stage_memory(MIXTRAL, ParallelConfig(world_size=16, ep=16), [32])


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["plan", "--preset", "qwen3-30b-a3b", "--gpus", "16", "--pp", "2"]
    assert main([*flags, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["ep"], row["edp"]) for row in rows] == [(1, 8), (2, 4), (4, 2), (8, 1)]
    assert [row["fits"] for row in rows] == [False, False, True, True]
    for row in rows:
        parts = sum(row["memory"][name] for name in ("weights", "optimizer", "activations"))
        assert row["total_gb"] == pytest.approx(parts / 1e9)
    assert main(["plan", "--preset", "glam-137b-dense", "--gpus", "64", "--tp", "8", "--json"]) == 0
    (dense,) = json.loads(capsys.readouterr().out)
    assert (dense["ep"], dense["memory"]["expert_params"]) == (1, 0)
    assert main([*flags, "--ep", "8", "--gpu-gb", "40"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].endswith("fits 40 GB")
    assert table[1].split()[0] == "8"
    assert table[1].endswith("no")
    for wrong, message in (
        (
            ["--ep", "3"],
            "--ep (3) must divide the 128 experts of .*; use --ep 2\n",
        ),
        (["--ep", "16"], "--ep 16 times --etp 1 must divide the 8 GPUs of .* stage; use --ep 8\n"),
        (["--etp", "3"], "--ep 1 times --etp 3 must divide the 8 GPUs .*; use --ep 1 --etp 2\n"),
        (["--tp", "3"], "--tp (3) must divide the 32 attention heads of .*; use --tp 2\n"),
        (["--cp", "3"], "--cp (3) must cut the 4096 tokens of .* equal parts; use --cp 2\n"),
        (["--cp", "16"], "--cp 16 and --pp 2 take 32 GPUs or .*; got --gpus 16; use --gpus 32\n"),
        (["--etp", "0"], "--etp must be positive; got 0; use --etp 1\n"),
        (["--seq-length", "0"], "--seq-length must be positive; got 0"),
    ):
        assert main([*flags, *wrong]) == 2
        pattern = message.replace("(", r"\(").replace(")", r"\)")
        assert re.search(pattern, capsys.readouterr().err)
