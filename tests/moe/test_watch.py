"""Which rank the others wait for: said by a thread, from what every rank entered last."""

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from spawn import run_ranks
from watched import drill

from ep_plugin import MoEConfig, MoELayer, ParallelConfig, RoutingConfig, create_expert_groups
from ep_plugin.moe.watch import is_of_an_exchange
from ep_plugin.moe.watch.blame import (
    DIED,
    ENDED,
    FAILED,
    SILENT,
    STOPPED,
    Known,
    sentence,
    spans,
    to_blame,
)
from ep_plugin.moe.watch.place import Layer, Phase, Place, Seen, State, here

SEEN = Seen(41, 900, 800, "in combine of layer 17", False, State.RUNNING, "", "layer 1")
ALL = [Known(rank, f"node{rank // 2}", 100 + rank, SEEN) for rank in range(4)]


def with_fault(rank: int, fault: str | None, **changes: object) -> list[Known]:
    seen = replace(SEEN, where="in dispatch of layer 17", layer_moves=799)
    seen = replace(seen, **changes)  # type: ignore[arg-type]
    mine = replace(ALL[rank], seen=seen, fault=fault, seconds=12.0)
    return [mine if known.rank == rank else known for known in ALL]


WAIT = "ranks 0-2 wait for it in combine of layer 17, iteration 41"


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (DIED, "died; it was last in dispatch of layer 17, iteration 41"),
        (STOPPED, "is stopped; it was last in dispatch of layer 17, iteration 41"),
        (ENDED, "has ended; it was last in dispatch of layer 17, iteration 41"),
        (
            SILENT,
            "has not been heard of for 12 s; it was last in dispatch of layer 17, iteration 41",
        ),
        (
            FAILED,
            "failed with MemoryError in dispatch of layer 17, iteration 41; its own error says why",
        ),
        (None, "has been in dispatch of layer 17, iteration 41 for 12 s"),
    ],
)
def test_one_rank_is_to_blame(fault: str | None, told: str) -> None:
    ranks = with_fault(3, fault, why="MemoryError")
    assert sentence(ranks) == f"rank 3 (node1, pid 103) {told}; {WAIT}"


def test_a_slow_save_blames_nobody() -> None:
    ranks = [replace(known, seen=replace(SEEN, where="in a save")) for known in ALL]
    told = "no rank is behind another: ranks 0-3 are in a save, iteration 41"
    assert (to_blame(ranks), sentence(ranks)) == ([], told)


def test_a_rank_that_ended_as_it_should_is_not_waited_for() -> None:
    assert to_blame(with_fault(3, ENDED, finished=True, layer_moves=800)) == []


def test_stages_are_not_compared_with_each_other() -> None:
    """Another pipeline stage has another number of moves at any time."""
    assert to_blame(with_fault(3, None, family="layer 9")) == []


def test_who_failed_for_the_failure_of_another_is_not_to_blame() -> None:
    ranks = [replace(known, seen=replace(SEEN, state=State.LOST)) for known in ALL]
    ranks[2] = replace(ranks[2], fault=DIED)
    assert [known.rank for known in to_blame(ranks)] == [2]


def test_a_thousand_ranks_make_one_short_line() -> None:
    ranks = [replace(ALL[0], rank=rank) for rank in range(1000)]
    ranks = [replace(known, fault=SILENT) if known.rank % 8 == 3 else known for known in ranks]
    ranks = [
        replace(known, seen=replace(SEEN, where=f"in combine of layer {known.rank % 7}"))
        for known in ranks
    ]
    told = sentence(ranks)
    assert "and so of 122 further ranks" in told
    assert "further ranks elsewhere" in told
    assert told.count("\n") == 0


@given(st.sets(st.integers(0, 1100), min_size=1))
def test_spans_say_every_rank_once(ranks: set[int]) -> None:
    read: list[int] = []
    for part in spans(ranks).split(", "):
        first, _, last = part.partition("-")
        read.extend(range(int(first), int(last or first) + 1))
    assert read == sorted(ranks)


def entered(**settings: object) -> list[str]:
    """Return every place that one forward and backward of a layer enters."""
    groups = create_expert_groups(ParallelConfig(world_size=2, ep=2), ranks_per_node=1)
    config = MoEConfig(
        hidden_size=16,
        ffn_hidden_size=8,
        num_experts=4,
        routing=RoutingConfig(topk=2),
        **settings,  # type: ignore[arg-type]
    )
    layer, places = MoELayer(config, groups), []
    layer.place.name = "layer 7"
    real = Place.enter_layer

    def enter_layer(place: Place, code: int) -> None:
        real(place, code)
        places.append(place.seen().where)

    Place.enter_layer = enter_layer  # type: ignore[method-assign]
    layer(torch.randn(6, 16, requires_grad=True)).sum().backward()
    Place.enter_layer = real  # type: ignore[method-assign]
    return list(dict.fromkeys(places))


WALK = [
    "in the gate of layer 7",
    "in dispatch of layer 7",
    "in the experts of layer 7",
    "in combine of layer 7",
    "past layer 7",
    "in backward of combine of layer 7",
    "in backward of the experts of layer 7",
    "in backward of dispatch of layer 7",
    "past the backward of layer 7",
]


@pytest.mark.parametrize("dispatcher", ["alltoall", "hierarchical", "symm_mem"])
def test_a_layer_enters_its_phases_in_order(dispatcher: str) -> None:
    for places in run_ranks(2, entered_with, dispatcher, "serial"):
        assert places == WALK


def test_chunks_enter_the_exchanges() -> None:
    for places in run_ranks(2, entered_with, "alltoall", "chunked"):
        assert places == [place for place in WALK if "the experts" not in place]


def entered_with(dispatcher: str, overlap: str) -> list[str]:
    return entered(dispatcher=dispatcher, overlap=overlap)


def test_a_forked_process_does_not_write_where_its_parent_is() -> None:
    os.close(here.share())
    layer = Layer()
    layer.enter(Phase.GATE)
    before = here.seen()
    child = os.fork()
    if child == 0:
        layer.enter(Phase.COMBINE)
        here.fare(State.FAILED, "a child's error")
        os._exit(0 if "combine" in here.seen().where else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert here.seen() == before


def test_a_layer_beyond_the_room_for_names_is_just_a_layer() -> None:
    place = Place()
    numbers = [place.label(f"layer {number}") for number in range(1, 2000)]
    assert numbers[0] == 1
    assert set(numbers[1100:]) == {0}


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:561] Connection closed by peer"), True),
        (torch.distributed.DistBackendError("NCCL error"), True),
        (RuntimeError("shape mismatch"), False),
        (ValueError("gloo"), False),
    ],
)
def test_errors_of_exchanges_are_told_from_others(error: Exception, expected: bool) -> None:
    assert is_of_an_exchange(error) is expected


WAITS = "wait for it in dispatch of MoE layer 1, iteration 20"
BEFORE = "it was last past the backward of MoE layer 1, iteration 20"


def run_drill(
    kind: str, victim: int, folder: Path, keeps_store: bool = False
) -> tuple[str, list[int | None]]:
    codes = drill(kind, victim, folder / "output", keeps_store=keeps_store)
    return (folder / "output").read_text(), codes


def lines(text: str) -> list[str]:
    """Return what the watch said, on its own and below traces."""
    return [line for line in text.splitlines() if line.startswith("ep_plugin: rank")]


@pytest.mark.parametrize(("kind", "told"), [("die", "died"), ("raise", "failed with MemoryError")])
def test_who_dies_is_named_at_once_and_below_the_trace_of_each_survivor(
    kind: str, told: str, tmp_path: Path
) -> None:
    text, codes = run_drill(kind, 1, tmp_path)
    assert all(codes)
    before, _, below = text.partition("Traceback")
    traces = re.findall("RuntimeError.*Connection", below)
    notes = [line for line in below.splitlines() if f") {told}" in line and "rank 1 (" in line]
    assert len(notes) >= len(traces) >= 2, text
    assert all("in" in line and "iteration 2" in line for line in notes)
    if kind == "die":  # and at once, while no exchange has failed yet, by one rank
        assert [f") {told}; {BEFORE}" in line for line in lines(before)] == [True], text


def test_who_is_stopped_is_named_and_the_run_goes_on(tmp_path: Path) -> None:
    text, codes = run_drill("STOP", 2, tmp_path)
    assert codes == [0, 0, 0], text
    said = lines(text)
    assert "rank 2 (" in said[0]
    assert f"is stopped; {BEFORE}" in said[0]
    assert f"ranks 0-1 {WAITS}" in said[0]
    assert said[-1].startswith("ep_plugin: rank 0 goes on")
    assert not any(line.startswith("ep_plugin: rank 1 ") for line in said)


def test_the_word_comes_before_a_watchdog_aborts_the_process(tmp_path: Path) -> None:
    text, codes = run_drill("abort", 1, tmp_path)
    assert codes == [-6, None, -6]
    assert f"is stopped; {BEFORE}" in text
    assert "ranks 0, 2 " + WAITS in text
    assert "goes on" not in text


def test_who_is_slow_is_named_once_and_nothing_ends(tmp_path: Path) -> None:
    text, codes = run_drill("sleep", 0, tmp_path)
    assert codes == [0, 0, 0], text
    assert "rank 0 (" in text
    assert f"ranks 1-2 {WAITS}" in text


def test_who_ends_early_is_named(tmp_path: Path) -> None:
    text, codes = run_drill("end", 1, tmp_path)
    assert codes[1] == 0
    assert codes[0]
    assert f"has ended; {BEFORE}" in text


def test_who_keeps_the_store_and_dies_is_named_by_its_host(tmp_path: Path) -> None:
    text, codes = run_drill("KILL", 0, tmp_path, keeps_store=True)
    assert all(codes)
    assert f") died; {BEFORE}" in text


def test_who_keeps_the_store_and_is_stopped_is_named(tmp_path: Path) -> None:
    text, codes = run_drill("STOP", 0, tmp_path, keeps_store=True)
    assert codes == [0, 0, 0], text
    assert "rank 0 (" in text
    assert f"ranks 1-2 {WAITS}" in text
