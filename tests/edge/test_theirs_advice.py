"""Every value of Megatron's flags is taken or refused at once; what refusals say to type works."""

import argparse
import inspect
import re
import shlex
from functools import cache
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from command_line import Accepted, read, ways_out
from flag_values import parser
from megatron.core import activations

from ep_plugin.errors import ConfigError
from ep_plugin.megatron.arguments.theirs import BESIDE, BY_FIELD, check, choices
from ep_plugin.megatron.arguments.theirs_table import THEIRS
from ep_plugin.megatron.settings import ACTIVATIONS
from ep_plugin.moe.config import MoEConfig
from ep_plugin.moe.layer import MoELayer
from ep_plugin.moe.rules import at_one_rank

pytestmark = [pytest.mark.megatron, pytest.mark.newest]
SENTENCES = [
    *(
        (row.field, row.why if "; " in row.why else f"{row.why}; use {choices(row)}")
        for row in THEIRS
        if row.effect in ("acts", "refused") and row.why
    ),
    *((field, sentence) for field, _, sentence in BESIDE),
]
CONTEXT = {  # what the refused flag stood beside
    "tensor_parallel_num_weight_shards": "--expert-model-parallel-size 1",
    "expert_tensor_parallel_num_weight_shards": "--expert-model-parallel-size 1",
    "fp8_wgrad": "--fp8-format e4m3",
    "fp8_recipe": "--fp8-format hybrid --fp8-recipe tensorwise",
    "recompute_modules": "--recompute-granularity selective",
    "moe_shared_expert_gate": "--moe-shared-expert-intermediate-size 32",
    "moe_pad_expert_input_to_capacity": "--moe-pad-expert-input-to-capacity",
    "moe_shared_expert_overlap": "--moe-shared-expert-overlap",
    "use_grouped_gemm_for_shared_expert": "--use-grouped-gemm-for-shared-expert",
    "moe_router_quantile_balancing_ema": "--moe-router-quantile-balancing-ema 0.5",
    "offload_modules": "--offload-modules core_attn --fine-grained-activation-offloading",
    "moe_flex_dispatcher_backend": "--moe-token-dispatcher-type flex",
    "fine_grained_activation_offloading": "--fine-grained-activation-offloading",
    "high_priority_a2a_comm_stream": "--high-priority-a2a-comm-stream",
}
COMMAND = re.compile(r"ep-plugin (\w+) ([^,;]*)")
ADVICE = [
    (field, way) for field, sentence in SENTENCES for way in ways_out(COMMAND.sub("", sentence))
]


def test_a_command_that_a_refusal_says_to_run_is_one() -> None:
    found = [command for _, sentence in SENTENCES for command in COMMAND.findall(sentence)]
    assert found
    for name, words in found:
        command = argparse.ArgumentParser()
        import_module(f"ep_plugin.commands.{name}").add_arguments(command)
        command.parse_args(words.split())


@pytest.mark.parametrize(("field", "way"), ADVICE)
def test_what_a_refusal_says_to_type_is_accepted(field: str, way: list[str]) -> None:
    found = read(*CONTEXT.get(field, "").split(), *way)
    assert isinstance(found, Accepted), found


def test_every_refusal_says_what_to_do() -> None:
    for field, sentence in SENTENCES:
        do = re.search(r"; (use |leave it out)", sentence)
        assert do, f"{field}: {sentence}"
        for name, value in re.findall(r"use (\w+)=([\d.]+)", sentence):  # in Python
            assert name in BY_FIELD
            check(SimpleNamespace(num_moe_experts=4, **{name: float(value)}))


def values_of(action: argparse.Action) -> list[list[str]]:
    """Return the values that can be typed behind a flag; none but of switches and choices."""
    if action.nargs == 0:
        return [[]]
    return [[str(getattr(choice, "name", choice))] for choice in action.choices or ()]


def typed() -> list[list[str]]:
    """Return every switch, and every value of every choice, that has a row."""
    return [
        [flag, *value]
        for action in parser()._actions
        for flag in action.option_strings[:1]
        if flag.startswith("--") and not flag.startswith("--ep-") and action.dest in BY_FIELD
        for value in values_of(action)
    ]


@cache
def build(config: MoEConfig) -> None:
    MoELayer(at_one_rank(config), shared_expert=torch.nn.Identity(), device="meta")


@pytest.mark.parametrize("flags", typed(), ids=" ".join)
def test_every_value_is_refused_in_flags_or_makes_a_layer(flags: list[str]) -> None:
    found = read(*flags)
    if isinstance(found, str):
        assert found.startswith(flags[0])
        assert re.search(r"; (use |leave it out)", found)
        assert not re.search(r"<\w+|0x", found)
    elif not found.config.in_graph:  # which asks for a GPU's products, in a check of its own
        build(found.config)


# Rows that act, and say nothing to our block: Megatron around it reads them, or it is so anyway
# (alltoall, fp32, a type of loss without a coefficient, a recipe of FP8 that is off).
AROUND = frozenset(
    shlex.split(
        """
        --sequence-parallel --no-initialization
        --use-cpu-initialization --fp16 --bf16 --mtp-num-layers
        --init-method-std --calculate-per-token-loss --recompute-granularity
        --recompute-activations --moe-layer-recompute --moe-per-layer-logging --enable-cuda-graph
        --cuda-graph-impl --mlp-chunks-for-prefill
        --mlp-chunks-for-training --transformer-impl --optimizer
        --moe-shared-expert-intermediate-size --moe-router-load-balancing-type
        --moe-token-dispatcher-type --moe-router-dtype
        """
    )
)


def test_what_is_taken_alone_changes_the_layer_or_is_said() -> None:
    """A flag that belongs to another one, which is not there, is none that is taken."""
    plain = read()
    assert isinstance(plain, Accepted)
    quiet = set()
    for action in parser()._actions:
        flag, row = (*action.option_strings, "")[0], BY_FIELD.get(action.dest)
        if not flag.startswith("--") or flag.startswith("--ep-") or row is None:
            continue
        taken = row.effect == "acts" and getattr(plain.args, action.dest) == action.default
        for value in (values_of(action) or [["2"]]) if taken else []:
            if value == [str(action.default)]:
                continue  # what is so anyway
            try:
                found = read(flag, *value)
            except KeyError:  # a list of names, which no number is
                continue
            if isinstance(found, Accepted) and not found.said and found.config == plain.config:
                quiet.add(flag)
    assert quiet == AROUND


FUNCTIONS = [
    *(torch.nn.functional.silu, torch.nn.functional.gelu, torch.nn.functional.relu),
    *(function for _, function in inspect.getmembers(activations, callable)),
]


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_every_activation_of_a_configuration_is_one_of_ours_or_refused_by_name(
    function: Any, gated: bool
) -> None:
    config = SimpleNamespace(num_moe_experts=4, activation_func=function, gated_linear_unit=gated)
    if (function, gated) in ACTIVATIONS.values():
        check(config)
    else:
        with pytest.raises(ConfigError, match=r"^activation_func=|^gated_linear_unit=") as refusal:
            check(config)
        assert "use --ep-expert-activation" in str(refusal.value)
        assert "0x" not in str(refusal.value)


def test_a_recipe_of_fp8_needs_a_format() -> None:
    for recipe in ("tensorwise", "blockwise", "mxfp8"):
        assert isinstance(read("--fp8-recipe", recipe), str)
        assert isinstance(read("--fp8-recipe", recipe, "--ep-fp8", "rowwise"), str)
    for recipe in ("tensorwise", "blockwise"):
        assert isinstance(read("--fp8-recipe", recipe, "--fp8-format", "e4m3"), Accepted)
    assert isinstance(read("--fp8-recipe", "delayed"), Accepted)  # Megatron's default
