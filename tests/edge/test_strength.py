"""The weight of auxiliary losses between pipeline stages: never that of another micro-batch."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ep_plugin.megatron.block import strength
from ep_plugin.megatron.block.strength import Strength

pytestmark = pytest.mark.megatron
CONFIG = SimpleNamespace(num_moe_experts=4, calculate_per_token_loss=True)


def calc_loss(
    output: Tensor, loss_func: Any, config: Any, vp_stage: Any, num_microbatches: int
) -> Any:
    """Stand for Megatron's function of the name: only the last stage has a loss function."""
    if loss_func is None:
        return output, None
    loss, tokens, _ = loss_func(output)
    return loss, tokens


def forward(stage: Strength, tokens: int | None, number: int = 2) -> Tensor:
    """Run a micro-batch of so many counted tokens; None is a stage that does not know them."""
    output = torch.ones(2, requires_grad=True) * 1
    loss_func = None if tokens is None else lambda out: (out.sum(), torch.tensor(tokens), {})
    found: Tensor
    found, _ = stage.around_loss(calc_loss, output, loss_func, CONFIG, None, number)
    return found


def weight(stage: Strength, output: Tensor) -> Any:
    """Return the weight that a micro-batch's backward begins with."""
    output.sum().backward()
    return None if stage.now is None else float(stage.now)


@contextmanager
def world(store: dist.Store) -> Iterator[None]:
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def two_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core import parallel_state

    monkeypatch.setattr(strength, "_stages", lambda: 2)
    monkeypatch.setattr(strength, "_last_rank", lambda: 1)
    monkeypatch.setattr(parallel_state, "get_context_parallel_world_size", lambda: 1)


@pytest.mark.usefixtures("two_stages")
def test_after_a_restart_in_the_process_all_count_anew() -> None:
    """One rank goes on, one is replaced, and the store still has what they said before."""
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=2))
    first, last = Strength(), Strength()
    with world(store):
        for tokens in (3, 4, 5):
            there, here = forward(last, tokens), forward(first, None)
            assert (weight(last, there), weight(first, here)) == (tokens, tokens)
    last = Strength()
    with world(store):
        for tokens in (6, 7, 8, 9, 10):
            there, here = forward(last, tokens), forward(first, None)
            assert (weight(last, there), weight(first, here)) == (tokens, tokens)


@pytest.mark.usefixtures("two_stages")
def test_a_weight_ends_with_its_micro_batch() -> None:
    with world(dist.HashStore()):
        stage = Strength()
        assert weight(stage, forward(stage, 3)) == 3
        with torch.no_grad():
            forward(stage, 5)
        assert stage.now is None
