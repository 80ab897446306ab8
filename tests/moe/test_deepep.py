"""Dispatcher deepep: against a stand-in on CPU ranks, against DeepEP itself on two GPUs."""

import sys
from dataclasses import replace
from typing import Any

import pytest
import symm_mem_cases as cases
import torch
from spawn import run_ranks

from ep_plugin import ConfigError, MoEConfig, RoutingConfig
from ep_plugin.moe.interfaces import Dispatcher, combine
from ep_plugin.registry import resolve

NUM_GPUS = torch.cuda.device_count()
CONFIG = MoEConfig(hidden_size=16, ffn_hidden_size=8, num_experts=cases.EXPERTS)


def stand_in() -> Any:
    """Put the stand-in where the package would be, in this process, and return it."""
    import deep_ep_standin

    sys.modules["deep_ep"] = deep_ep_standin
    return deep_ep_standin


def agrees(ranks: int) -> tuple[int, list[str]]:
    """Equal to alltoall in every bit, and each function's backward is the other."""
    buffer_class = stand_in().Buffer
    made = buffer_class.made
    checked = cases.agree(ranks, 1, "cpu", 16, name="deepep", dtypes=(torch.bfloat16,))
    groups = cases.make_groups(ranks)
    small = resolve("dispatcher", "deepep")(CONFIG, groups)
    assert resolve("dispatcher", "deepep")(CONFIG, groups).buffer is small.buffer
    large = resolve("dispatcher", "deepep")(replace(CONFIG, hidden_size=32), groups)
    assert large.buffer.num_nvl_bytes == 100 * 2 * 32 * ranks == 2 * small.buffer.num_nvl_bytes
    assert buffer_class.made == made + 3  # one for `agree`
    return checked, in_order(small)


def in_order(dispatcher: Dispatcher) -> list[str]:
    ids = cases.random_ids("random", 5, 2, seed=2)
    hidden, probs = cases.leaves(ids, 16, torch.bfloat16)
    buffer: Any = dispatcher.buffer  # type: ignore[attr-defined]
    routing = cases.Routing(ids, probs, cases.count(ids, cases.EXPERTS))
    pending = dispatcher.start_dispatch(hidden, routing)
    assert not buffer.waited
    inbox = pending.wait()
    assert len(buffer.waited) == 1
    output = combine(dispatcher, cases.outputs_of(inbox), inbox)
    assert len(buffer.waited) == 2
    output.sum().backward()
    assert len(buffer.waited) == 2  # in the backward the stream waits
    started: list[str] = buffer.started
    return started


def check_record() -> None:
    """Names become int64, and a choice that is another rank's has no weight and no gradient."""
    from ep_plugin.moe.dispatcher import deepep

    ids = torch.tensor([[1, -1], [0, 1]], dtype=torch.int32)
    probs = torch.tensor([[0.25, 0.5], [0.75, 0.125]], requires_grad=True)
    inbox = deepep.received(torch.zeros(2, 16), ids, probs, 3, "layout")
    assert inbox.expert_ids.dtype == torch.int64
    assert inbox.expert_ids.tolist() == ids.tolist()
    assert inbox.probs.tolist() == [[0.25, 0], [0.75, 0.125]]
    assert inbox.tokens_per_expert.tolist() == [1, 2, 0]
    assert inbox.handle == "layout"
    inbox.probs.sum().backward()
    assert probs.grad is not None
    assert probs.grad.tolist() == [[1, 0], [1, 1]]


def refusals() -> list[str]:
    """Return what is said of what the kernels do not take; no buffer is made, nothing is sent."""
    buffers = stand_in().Buffer
    build = resolve("dispatcher", "deepep")
    groups, sliced = cases.make_groups(4), cases.make_groups(2, 2)
    fp8 = replace(CONFIG, fp8="rowwise", dispatch_dtype="fp8", dispatcher="alltoall")
    tries = [
        lambda: build(CONFIG, cases.ExpertGroups()),
        lambda: build(CONFIG, sliced),
        lambda: build(fp8, groups),
        lambda: build(replace(CONFIG, hidden_size=24), groups),
        lambda: build(replace(CONFIG, hidden_size=8192), groups),
        lambda: build(replace(CONFIG, routing=RoutingConfig(router_dtype="fp64")), groups),
        lambda: build(replace(CONFIG, num_experts=516), groups),
    ]
    said = []
    for attempt in tries:
        with pytest.raises(ConfigError) as error:
            attempt()
        said.append(str(error.value))
    assert buffers.made == 0
    dispatcher = build(CONFIG, groups)
    with pytest.raises(ConfigError) as error:
        dispatcher.start_dispatch(torch.zeros(2, 16), None)
    assert not dispatcher.buffer.started
    return [*said, str(error.value)]


REFUSED = [
    "needs process groups; got None; use dispatcher='local'",
    "needs etp=1; got 2; use dispatcher='alltoall'",
    "needs dispatch_dtype='bf16'; got fp8; use dispatcher='alltoall'",
    "needs a hidden_size that is a multiple of 16, 8176 at most; got 24",
    "needs a hidden_size that is a multiple of 16, 8176 at most; got 8192",
    "needs probabilities in fp32; got fp64; use router_dtype='fp32'",
    "needs at most 128 experts of a rank; got 129; use dispatcher='alltoall'",
    "carries tokens in bfloat16; got torch.float32; use a layer in bfloat16 or "
    "dispatcher='alltoall'",
]


def check() -> tuple[list[str], int, list[str]]:
    stand_in()  # in processes of their own: the tests' must not know it
    check_record()
    return refusals(), *agrees(4)


def test_the_interface_is_used_as_documented() -> None:
    """What cannot be carried is refused on every rank; the rest equals alltoall to the bit."""
    results = run_ranks(4, check)
    started = ["dispatch", "combine", "dispatch again", "combine"]
    for messages, *rest in results:
        assert rest == [len(cases.CASES), started]
        for message, part in zip(messages, REFUSED, strict=True):
            assert part in message


def on_two_gpus() -> int:
    few = {"name": "deepep", "dtypes": (torch.bfloat16,)}
    return cases.agree(2, 1, "cuda", 128, **few) + cases.agree(2, 1, "cuda", 2048, 500, **few)


@pytest.mark.multi_gpu
def test_two_gpus_equal_alltoall() -> None:
    try:
        resolve("dispatcher", "deepep")
    except ConfigError as error:
        pytest.skip(str(error))
    if NUM_GPUS < 2:
        pytest.skip("fewer than two GPUs")
    assert run_ranks(2, on_two_gpus, backend="nccl") == [2 * len(cases.CASES)] * 2
