"""What overlap means: the order in which exchanges start, products run, and exchanges end."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from overlap_cases import BASE, ScriptedRouter, routings
from spawn import run_ranks
from torch import Tensor, nn

from ep_plugin import ConfigError, ExpertGroups, MoELayer, ParallelConfig, create_expert_groups
from ep_plugin.moe.schedule.two_batch import two_batch
from ep_plugin.registry import resolve

H = BASE.hidden_size
Events = list[str]


class RecordingGemm:
    """torch_grouped, with the name of each product, and what weight gradients were made of."""

    waits_for_host = False

    def __init__(self, events: Events) -> None:
        self.real = resolve("gemm", "torch_grouped")(H, H, torch.float32)
        self.events = events
        self.operands: list[Tensor] = []

    def forward(self, *operands: Tensor) -> Any:
        self.events.append("product")
        return self.real.forward(*operands)

    def dgrad(self, *operands: Tensor) -> Any:
        self.events.append("dgrad")
        return self.real.dgrad(*operands)

    def wgrad(self, grads: Tensor, rows: Tensor, ends: Tensor) -> Any:
        self.events.append("wgrad")
        self.operands += [grads[: ends[-1]], rows[: ends[-1]], ends]
        return self.real.wgrad(grads, rows, ends)


def recorded(start: Callable[..., Any], events: Events, counts: Callable[..., bool]) -> Any:
    """Return `start` with its calls, and the waits for them, among the events."""

    def recording(*args: Any, **more: Any) -> Any:
        pending = start(*args, **more)
        if not counts(*args):
            return pending
        events.append("start")

        class Waited:
            def wait(self) -> Any:
                events.append("wait")
                return pending.wait()

        return Waited()

    return recording


def is_hidden(out: Tensor, *_: Any) -> bool:
    return out.dim() == 2 and out.shape[1] == H and out.is_floating_point()


class Shared(nn.Module):
    """A shared expert that says when it runs, and when its backward does."""

    def __init__(self, events: Events) -> None:
        super().__init__()
        self.events = events
        self.linear = nn.Linear(H, H, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        self.events.append("shared")
        output: Tensor = self.linear(hidden)
        if output.grad_fn is not None:
            output.grad_fn.register_prehook(lambda _: self.events.append("shared"))
        return output


def run(
    overlap: str, chunks: int | None, shared: bool, dispatcher: str = "alltoall"
) -> tuple[Events, Events, list[Tensor]]:
    """Return forward and backward events of a layer over all ranks, and wgrad's operands."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    groups = create_expert_groups(ParallelConfig(world_size=ranks, ep=ranks))
    events: Events = []
    config = replace(
        BASE, overlap=overlap, overlap_chunks=chunks, save="recompute", dispatcher=dispatcher,
        dispatch_dedup=dispatcher == "alltoall",
    )  # fmt: skip
    ids = routings()["different counts"][rank]
    torch.manual_seed(rank)
    layer = MoELayer(config, groups, shared_expert=Shared(events) if shared else None)
    layer.router = ScriptedRouter(ids, torch.ones(ids.shape))
    with torch.no_grad():
        for weight in layer.experts.parameters():
            weight.copy_(torch.randint(-2, 3, weight.shape))
    gemm = RecordingGemm(events)
    layer.experts.linear_fc1.pick_gemm = lambda num_rows: gemm  # type: ignore[method-assign]
    swaps: Any = layer.dispatcher
    if hasattr(swaps, "swap"):
        swaps.swap = recorded(swaps.swap, events, lambda *_: True)
    hidden = torch.randint(-2, 3, (len(ids), H)).float().requires_grad_()
    exchange = recorded(dist.all_to_all_single, events, is_hidden)
    with patch.object(dist, "all_to_all_single", exchange):
        outputs = two_batch(layer, hidden, hidden) if overlap == "two_batch" else [layer(hidden)]
        forward = events[:]
        events.clear()
        torch.stack([output.sum() for output in outputs]).sum().backward()
    return forward, events, gemm.operands


RECOMPUTED = ["product"]  # of fc1, with save = recompute
FORTH, BACK = ["product"] * 2, [*RECOMPUTED, "dgrad", "dgrad"]


CHUNKS = [(2, None), (4, None), (4, 3)]


@pytest.mark.parametrize("dispatcher", ["alltoall", "symm_mem"])
@pytest.mark.parametrize(("ranks", "chunks"), CHUNKS)
def test_chunked_computes_own_rows_while_others_travel(
    ranks: int, chunks: int | None, dispatcher: str
) -> None:
    """And the others' results and token gradients travel while the rest is computed."""
    num = chunks or min(2, ranks - 1)
    out, home, weights = ["start"] * num, ["wait"] * num, ["wgrad", "wgrad"]
    for forward, backward, _ in run_ranks(ranks, run, "chunked", chunks, False, dispatcher):
        assert forward == out + FORTH[:1] + ["wait", *FORTH, "start"] * num + FORTH[1:] + home
        if dispatcher == "alltoall":
            parts = BACK + ["wait", *BACK, "start"] * num
        else:
            parts = BACK[:-1] + ["wait", *BACK[:-1]] * num + BACK[-1:] + out
        assert backward == out + parts + weights + home


def test_shared_expert_runs_while_tokens_and_their_gradients_travel() -> None:
    for forward, backward, _ in run_ranks(2, run, "shared_expert", None, True):
        exchange = ["start", "wait"]
        assert forward == ["start", "shared", "wait", *FORTH, *exchange]
        assert [e for e in backward if "grad" not in e and e != "product"] == [
            *exchange,
            *["start", "shared", "wait"],
        ]


def test_two_batch_computes_one_while_the_other_travels() -> None:
    experts_back = ["product", "dgrad", "wgrad", "dgrad", "wgrad"]
    for forward, backward, _ in run_ranks(2, run, "two_batch", None, True):
        departures = ["start", "shared"] * 2
        assert forward == departures + ["wait", *FORTH, "start"] * 2 + ["wait"] * 2
        arrivals = ["shared", "wait"] * 2
        assert backward == ["start"] * 2 + ["wait", *experts_back, "start"] * 2 + arrivals


def test_serial_overlaps_nothing() -> None:
    for forward, backward, _ in run_ranks(2, run, "serial", None, True):
        assert forward == ["start", "wait", *FORTH, "start", "wait", "shared"]
        assert [e for e in backward if e in ("start", "wait", "shared")] == [
            *["shared", "start", "wait", "start", "wait"]
        ]


@pytest.mark.parametrize("ranks", [2, 4])
def test_weight_gradients_read_the_same_rows_in_the_same_order(ranks: int) -> None:
    """So that their sums have the same bits, whatever the numbers are."""
    serial = run_ranks(ranks, run, "serial", None, False)
    chunked = run_ranks(ranks, run, "chunked", None, False)
    for (_, _, expected), (_, _, found) in zip(serial, chunked, strict=True):
        assert len(expected) == 6
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


class Ranks(ExpertGroups):
    """Four ranks, without groups."""

    ep_size = 4  # type: ignore[assignment]


class Block:
    """What `build` looks at."""

    groups: ExpertGroups = Ranks()
    dispatcher: Any = None
    experts: Any = None
    shared_expert: Any = None


REFUSED = [
    ("shared_expert", {}, "there is none; use overlap='chunked' or overlap='serial'"),
    ("chunked", {"bias": True}, "needs experts without bias; .* overlap='serial'"),
    (
        "chunked",
        {"dispatcher": "other"},
        r"\(other\) does not; use dispatcher='alltoall'",
    ),
]


@pytest.mark.parametrize(("overlap", "changes", "message"), REFUSED)
def test_what_a_schedule_cannot_do_is_refused(
    overlap: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve("overlap", overlap)(replace(BASE, **changes), Block())


def test_more_chunks_than_other_ranks_are_refused() -> None:
    class Peers:
        wire_format = None
        start_dispatch = start_combine = pack = swap = unpack = print

    class WithSwaps(Block):
        dispatcher = Peers()

    config = replace(BASE, overlap="chunked", overlap_chunks=4)
    with pytest.raises(ConfigError, match=r"use overlap_chunks=3"):
        resolve("overlap", "chunked")(config, WithSwaps())
    with pytest.raises(ConfigError, match="use overlap='chunked' or overlap_chunks=None"):
        replace(config, overlap="serial")


def test_one_rank_has_nothing_to_hide() -> None:
    """With one rank chunked is the serial order: the same function of the same rows."""
    torch.manual_seed(0)
    hidden = torch.randn(9, H)
    layer = MoELayer(replace(BASE, overlap="chunked"))
    serial = MoELayer(BASE)
    serial.load_state_dict(layer.state_dict())
    assert torch.equal(layer(hidden), serial(hidden))
