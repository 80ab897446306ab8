"""A user's own router, dispatcher and grouped GEMM that have the protocol and nothing more."""

from collections import Counter
from typing import Any

import pytest
import torch
from counted_run import METHODS, count_calls
from spawn import run_ranks
from torch import Tensor, nn

from ep_plugin import (
    ConfigError,
    MoEConfig,
    MoELayer,
    ParallelConfig,
    RoutingConfig,
    create_expert_groups,
)
from ep_plugin.contracts import Routing

OURS = {"router": "topk", "dispatcher": "alltoall", "gemm": "loop"}
OWN = {kind: f"my_moe.{kind}" for kind in OURS}
SIZES: dict[str, Any] = {
    **{"hidden_size": 16, "ffn_hidden_size": 8, "num_experts": 4},
    "routing": RoutingConfig(topk=2, normalize="none"),
}


def train(options: dict[str, str]) -> tuple[list[float], set[str]]:
    """Return this rank's losses of three steps, and the methods that were called."""
    calls: Counter[str] = Counter()
    count_calls(calls)
    groups = create_expert_groups(ParallelConfig(world_size=2, ep=2))
    torch.manual_seed(0)
    layer = MoELayer(MoEConfig(**SIZES, **options), groups)
    optimizer = torch.optim.SGD(layer.parameters(), lr=10.0)
    hidden = torch.randn(9, 16)
    losses = []
    for _ in range(3):
        loss = (layer(hidden) - hidden).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, set(calls)


def test_own_options_train_as_ours_do() -> None:
    (ours, none), (_, also_none) = run_ranks(2, train, OURS)
    assert none == also_none == set()
    assert ours[2] < ours[0]
    for own, called in run_ranks(2, train, OWN):
        assert called == {f"{owner.__name__}.{name}" for owner, name in METHODS}
        assert own == pytest.approx(ours, rel=1e-5)


class Wrong(nn.Module):
    """A router that returns what a case says."""

    def __init__(self, ids: Tensor, probs: Tensor, counts: Tensor) -> None:
        super().__init__()
        self.routing = Routing(ids, probs, counts)

    def forward(self, hidden: Tensor, num_sequences: int = 1) -> Routing:
        return self.routing


IDS = torch.tensor([[0, 1], [2, -1], [3, 0]])
PROBS, COUNTS = torch.ones(3, 2), torch.tensor([2, 1, 1, 1])
WRONG = [
    (IDS, PROBS, COUNTS[:3], r"tokens_per_expert .* \[4\] int64, .*; got \[3\] int64"),
    (IDS, PROBS, COUNTS.float(), r"tokens_per_expert .* int64, .*; got \[4\] float32"),
    (IDS[:2], PROBS, COUNTS, r"expert_ids .* \[3, K\] int64, .*; got \[2, 2\] int64"),
    (IDS.int(), PROBS, COUNTS, r"expert_ids .* int64, .*; got \[3, 2\] int32"),
    (IDS.flatten(), PROBS, COUNTS, r"expert_ids .* \[3, K\] .*; got \[6\] int64"),
    (IDS, PROBS[:, :1], COUNTS, r"probs .* \[3, 2\] floating point, .*; got \[3, 1\] float32"),
    (IDS, PROBS.long(), COUNTS, r"probs .* floating point, .*; got \[3, 2\] int64"),
    (IDS + 2, PROBS, COUNTS, r"expert_ids from 0 to 3, or -1 .*; got 1 to 5"),
    (IDS, PROBS, COUNTS.flip(0), r"each expert is in expert_ids, \[2, 1, 1, 1\]; got \[1, 1, 1, 2"),
]


@pytest.mark.parametrize(("ids", "probs", "counts", "message"), WRONG)
def test_a_wrong_routing_is_told_in_words(
    ids: Tensor, probs: Tensor, counts: Tensor, message: str
) -> None:
    layer = MoELayer(MoEConfig(**SIZES))
    layer.router = Wrong(ids, probs, counts)
    with pytest.raises(ConfigError, match=message):
        layer(torch.randn(3, 16))


def test_a_right_routing_is_looked_at_once() -> None:
    layer = MoELayer(MoEConfig(**SIZES))
    layer.router = Wrong(IDS, PROBS, COUNTS)
    assert layer(torch.randn(3, 16)).shape == (3, 16)
    layer.router = Wrong(IDS, PROBS, COUNTS.flip(0))
    layer.route(torch.randn(3, 16))


def forgets_an_expert() -> str:
    groups = create_expert_groups(ParallelConfig(world_size=2, ep=2))
    layer = MoELayer(MoEConfig(**SIZES), groups)
    layer.router = Wrong(IDS.clamp(max=2), PROBS, COUNTS[:3])
    with pytest.raises(ConfigError) as caught:
        layer(torch.randn(3, 16))
    return str(caught.value)


def test_a_router_that_forgets_an_expert_is_refused_before_anything_is_sent() -> None:
    for told in run_ranks(2, forgets_an_expert):
        assert told.startswith("the router must return tokens_per_expert of shape and dtype [4]")
