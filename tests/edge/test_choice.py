"""`auto` under Megatron's layer: what it takes on GPUs of one host, and the one line it says."""

import contextlib
import io
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from both_layers import LENGTH, SEQUENCES, observe
from spawn import run_ranks

from ep_plugin.megatron.cpu import mode as cpu_mode
from ep_plugin.megatron.edge_settings import EdgeSettings
from ep_plugin.megatron.seams.install import install, uninstall
from ep_plugin.moe.auto import Place
from ep_plugin.moe.dispatcher import _trial

pytestmark = [pytest.mark.megatron, pytest.mark.newest]
LAYOUT = {"expert_model_parallel_size": 2}
PLAIN = EdgeSettings(dispatcher="alltoall", overlap="serial")
AUTO = EdgeSettings(tokens=LENGTH * SEQUENCES)


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
