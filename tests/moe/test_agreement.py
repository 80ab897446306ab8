"""Ranks that stop agreeing are told so, all of them, and nobody waits for ever."""

from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from spawn import run_ranks

from ep_plugin import MoEConfig, MoELayer, ParallelConfig, RoutingConfig, create_expert_groups
from ep_plugin.moe.dispatcher._agreement import FIRST_CALLS, RanksDisagree
from ep_plugin.moe.interfaces import Dispatched

RANKS = 4


def make_layer(shared: Any = None, **changes: Any) -> MoELayer:
    groups = create_expert_groups(ParallelConfig(world_size=RANKS, ep=RANKS), ranks_per_node=2)
    sizes = {"hidden_size": 16, "ffn_hidden_size": 8, "num_experts": 4}
    config = MoEConfig(**{**sizes, "routing": RoutingConfig(topk=2), **changes})
    return MoELayer(config, groups, shared_expert=shared)


def fails_in_the_third_call(dispatcher: str, schedule: str) -> str:
    """Return what this rank is told when the experts of rank 2 fail."""
    layer = make_layer(torch.nn.Linear(16, 16), dispatcher=dispatcher, overlap=schedule)
    experts, calls = layer.experts.forward, 0

    def forward(inbox: Dispatched) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 3 and dist.get_rank() == 2:
            raise MemoryError("no room for rows")
        return experts(inbox)

    layer.experts.forward = forward  # type: ignore[method-assign]
    for _ in range(2):
        layer(torch.randn(5, 16)).sum().backward()
    with pytest.raises((MemoryError, RanksDisagree)) as caught:
        layer(torch.randn(5, 16))
    return f"{caught.type.__name__}: {caught.value}"


@pytest.mark.parametrize(
    ("dispatcher", "schedule"), [("alltoall", "serial"), ("hierarchical", "shared_expert")]
)
def test_a_rank_that_fails_is_named_on_every_other(dispatcher: str, schedule: str) -> None:
    told = run_ranks(RANKS, fails_in_the_third_call, dispatcher, schedule)
    assert told.pop(2) == "MemoryError: no room for rows"
    (message,) = set(told)
    assert message.startswith("RanksDisagree: rank 2 of the 4 of the expert group failed between")
    assert "call 3" in message


def disagrees(**changes: Any) -> str:
    mine = changes if dist.get_rank() == 1 else {}
    layer = make_layer(**mine)
    with pytest.raises(RanksDisagree) as caught:
        layer(torch.randn(3, layer.config.hidden_size))
    return str(caught.value)


def disagrees_on_hidden_size() -> str:
    return disagrees(hidden_size=32)


def disagrees_on_topk() -> str:
    return disagrees(routing=RoutingConfig(topk=3))


def disagrees_on_experts() -> str:
    return disagrees(num_experts=8)


@pytest.mark.parametrize(
    ("function", "what"),
    [
        (disagrees_on_hidden_size, "the hidden size before tokens move; got 16, 32, 16, 16"),
        (disagrees_on_topk, "choices of a token before tokens move; got 2, 3, 2, 2"),
        (disagrees_on_experts, "experts before tokens move; got 4, 8, 4, 4"),
    ],
)
def test_what_differs_is_named_with_every_rank_s_value(function: Any, what: str) -> None:
    (message,) = set(run_ranks(RANKS, function))
    assert what in message


def gathers(check_splits: str, calls: int) -> int:
    layer = make_layer(check_splits=check_splits)
    counted, real = 0, dist.all_gather

    def counting(*args: Any, **more: Any) -> Any:
        nonlocal counted
        counted += 1
        return real(*args, **more)

    with patch.object(dist, "all_gather", counting):
        for _ in range(calls):
            layer(torch.randn(2, 16))
    return counted


@pytest.mark.parametrize(
    ("check_splits", "expected"),
    [("first", 2 * FIRST_CALLS), ("always", 2 * FIRST_CALLS + 4), ("off", 0)],
)
def test_it_is_asked_as_often_as_told(check_splits: str, expected: int) -> None:
    assert set(run_ranks(RANKS, gathers, check_splits, FIRST_CALLS + 2)) == {expected}
