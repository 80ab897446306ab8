"""`auto` under Megatron's layer: what it takes on GPUs of one host, and the one line it says."""

import contextlib
import io
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from both_layers import LENGTH, SEQUENCES, observe
from spawn import run_ranks

from ep_plugin.megatron.block import choice
from ep_plugin.megatron.cpu import mode as cpu_mode
from ep_plugin.megatron.edge_settings import EdgeSettings
from ep_plugin.megatron.seams.install import install, uninstall
from ep_plugin.moe.auto import Place
from ep_plugin.moe.config import MoEConfig
from ep_plugin.moe.dispatcher import _trial
from ep_plugin.moe.groups import ExpertGroups

pytestmark = [pytest.mark.megatron, pytest.mark.newest]
LAYOUT = {"expert_model_parallel_size": 2}
PLAIN = EdgeSettings(dispatcher="alltoall", overlap="serial")
SIZES = {"num_experts": 4, "hidden_size": 64, "ffn_hidden_size": 64}
AUTO = EdgeSettings(tokens=LENGTH * SEQUENCES)


def said_by_models(*bytes_of_each: int) -> list[str]:
    """Return what this rank says of models whose layers hold so many tokens, in that order."""
    world = dist.group.WORLD
    groups = ExpertGroups(ep=world, ep_etp=world, tp_dp_cp=world)
    asked = MoEConfig(**SIZES, dispatcher="auto", overlap="auto")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for tokens in bytes_of_each:
            for _ in range(2):  # as layers and stages do
                found = replace(asked, dispatcher="symm_mem", overlap="serial", tokens=tokens)
                choice.say(asked, found, groups)
    return printed.getvalue().splitlines()


def test_each_choice_of_a_run_is_said_once() -> None:
    """A second model may have another; the first said nothing of it."""
    first, second = run_ranks(2, said_by_models, 1 << 12, 1 << 16, 1 << 12)
    assert ["buffer of 2 MiB" in line for line in first] == [True, False], first
    assert ["buffer of 19 MiB" in line for line in first] == [False, True]
    assert second == []


def trained(settings: EdgeSettings) -> tuple[dict[str, Any], list[str]]:
    """Return what a layer computed on this rank, and what each rank said meanwhile."""
    said = io.StringIO()
    install(settings)
    try:
        with contextlib.redirect_stdout(said):
            seen = observe(LAYOUT, {})
    finally:
        uninstall()
        cpu_mode.enable()
    of_ranks: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(of_ranks, said.getvalue())
    return seen, of_ranks


def as_on_gpus(works: bool) -> dict[str, Any]:
    """Train with the plain exchange and with `auto`, which is told that the CPUs are GPUs."""
    cpu_mode.enable()
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(**LAYOUT)
    plain = trained(PLAIN)
    place = patch(
        "ep_plugin.moe.layer.Place", lambda ranks, cuda, **more: Place(ranks, True, **more)
    )
    with place, patch.object(_trial, "_missing", lambda *_: None if works else "no NVLink"):
        return {"plain": plain, "auto": trained(AUTO)}


@pytest.mark.parametrize(
    ("works", "line"),
    [
        (
            True,
            "auto takes --ep-dispatcher symm_mem --ep-overlap serial for 2 ranks of ep and etp, "
            "with a buffer of 1 MiB on each GPU; ",
        ),
        (
            False,
            "auto takes --ep-dispatcher alltoall --ep-dispatch-dedup on --ep-overlap serial for 2 "
            "ranks of ep and etp, since symm_mem does not work here: no NVLink; ",
        ),
    ],
)
def test_it_computes_the_same_and_says_once_what_it_took(works: bool, line: str) -> None:
    found = run_ranks(2, as_on_gpus, works)[0]
    (plain, nothing), (auto, said) = found["plain"], found["auto"]
    assert not any("auto takes" in text for text in nothing)
    assert [text.count("auto takes") for text in said] == [1, 0]
    back = "to have it as it was before: --ep-dispatcher alltoall --ep-overlap serial"
    assert line + back in said[0]
    for what, expected in plain.items():
        for step, right in zip(auto[what], expected, strict=True):
            torch.testing.assert_close(torch.tensor(step), torch.tensor(right))
