"""Presets in Megatron: arguments mean what they say, models have the size counted, nanos train."""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from loop import OURS, ROOT, launch_with

from ep_plugin import RoutingConfig
from ep_plugin.commands.report.events import read_run
from ep_plugin.megatron.arguments.checks import settings_from_args
from ep_plugin.megatron.arguments.parser import add_ep_arguments
from ep_plugin.megatron.arguments.spell import megatron_arguments
from ep_plugin.megatron.settings import moe_pattern, routing_config
from ep_plugin.presets import Preset, load, presets, total_params

pytestmark = pytest.mark.megatron
NAMES = list(presets())
NANOS = [name for name in NAMES if name.endswith("-nano")]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "glam-137b-dense"])
def test_arguments_give_the_preset_s_routing_and_layers(name: str) -> None:
    from megatron.training import arguments

    parser = add_ep_arguments(arguments.add_megatron_arguments(argparse.ArgumentParser()))
    args = parser.parse_args(["--ep-preset", name])
    preset = load(name)
    settings = settings_from_args(args)
    expected = preset.routing
    if preset.model.biases:
        expected = replace(expected, router_bias=False)
    assert routing_config(args, settings) == expected
    assert args.num_layers == len(preset.model.experts)
    assert moe_pattern(args) == [int(experts > 0) for experts in preset.model.experts]
    counts = settings.experts_per_layer or [args.num_experts] * sum(moe_pattern(args))
    assert list(counts) == [experts for experts in preset.model.experts if experts]
    assert settings.router == preset.router


def test_flags_beside_a_preset_win() -> None:
    from megatron.training import arguments

    parser = add_ep_arguments(arguments.add_megatron_arguments(argparse.ArgumentParser()))
    for given in (
        ["--ep-preset", "mixtral-8x7b", "--num-layers", "4", "--ep-topk", "1"],
        ["--num-layers", "4", "--ep-topk", "1", "--ep-preset=mixtral-8x7b"],
    ):
        args = parser.parse_args(given)
        assert (args.num_layers, args.moe_router_topk, args.num_experts) == (4, 1, 8)


def decoder(preset: Preset) -> Preset:
    """What Megatron's GPT builds of a preset: the decoder alone, without relative positions."""
    model = replace(preset.model, encoder_experts=())
    if model.positions != "learned":
        model = replace(model, positions="rope")
    # Megatron's expert bias is a buffer, not a parameter.
    routing = replace(preset.routing, expert_bias=False)
    return replace(preset, model=model, routing=routing)


@pytest.mark.newest
def test_models_without_storage_have_the_parameters_counted() -> None:
    """Every preset built by Megatron under fake tensors, in one process."""
    command = [sys.executable, str(ROOT / "tests" / "helpers" / "count_parameters.py"), *NAMES]
    done = subprocess.run(
        command,
        env={**os.environ, "EP_PLUGIN_DEVICE": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    counted = json.loads(done.stdout.splitlines()[-1])
    for name in NAMES:
        assert counted[name] == total_params(decoder(load(name))), name


@pytest.mark.newest
@pytest.mark.parametrize("name", NANOS)
def test_every_nano_twin_trains_at_ep_2(name: str, tmp_path: Path) -> None:
    done = launch_with(
        *(2, OURS, "--ep-preset", name, "--expert-model-parallel-size", "2"),
        *("--expert-tensor-parallel-size", "1", "--train-iters", "20"),
        *("--tensorboard-dir", str(tmp_path)),
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    losses = [value for _, value in read_run(tmp_path).series("lm loss")]
    assert len(losses) == 20
    assert sum(losses[-3:]) / 3 < losses[0] - 0.3


def test_the_presets_are_what_the_plugin_would_refuse_otherwise() -> None:
    """Expert choice is forced by its preset alone."""
    assert load("ec-8b-64e").routing.force_expert_choice
    assert not RoutingConfig().force_expert_choice
    assert "--ep-force-expert-choice" in megatron_arguments(load("ec-nano"))
