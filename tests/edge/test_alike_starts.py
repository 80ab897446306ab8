"""How ranks start: late, again after a failed attempt, from other layouts, or not at all."""

import functools
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from meetings import BASE, answer, facts, models, of, parse, together
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_layer import TransformerLayer

from ep_plugin import sources
from ep_plugin.errors import ConfigError
from ep_plugin.megatron.arguments.digest import text_of
from ep_plugin.megatron.ranks import environment, model, versions
from ep_plugin.megatron.ranks import store as pace
from ep_plugin.megatron.ranks.answers import Answer
from ep_plugin.megatron.ranks.compared import subject
from ep_plugin.megatron.ranks.meeting import Meeting
from ep_plugin.megatron.ranks.sentence import Flags
from ep_plugin.megatron.seams import alike, refusal

pytestmark = [pytest.mark.megatron, pytest.mark.newest]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("STRETCH", 0.2), ("LOST", 1.5), ("GRACE", 0.2), ("ALIVE", 1.0)):
        monkeypatch.setattr(pace, name, seconds)
    monkeypatch.setattr(pace, "LEAVE", 0.5)
    monkeypatch.setattr(pace, "FIRST_STRETCH", 0.1)


def come(store: Any, rank: int, size: int, patience: float = 10.0, **more: Any) -> Answer:
    one = facts(a=1)
    part = Meeting(store, rank, size, patience, **more)
    return part.agree(subject("start", Flags()), one.record(), one.whole)


def after(seconds: float, what: Callable[[], Any]) -> Any:
    time.sleep(seconds)
    return what()


def test_a_next_start_meets_over_the_store_of_one_that_failed() -> None:
    """A rank did not come; then all do, in new processes, any of them late."""
    for late in (0, 1):
        store = dist.HashStore()
        first = together(2, lambda rank: come(store, 2 * rank, 3, 0.3))  # noqa: B023
        assert not any(one.fine for one in first)
        again = together(
            3,
            lambda rank: after(0.4 * (rank == late), lambda: come(store, rank, 3)),  # noqa: B023
        )
        assert again == [Answer(True)] * 3


def test_a_next_start_meets_where_rank_0_was_killed_before_its_answer() -> None:
    store = dist.HashStore()
    pace.Place(store, "start").open("killed")
    again = together(3, lambda rank: after(0.5 * (rank == 0), lambda: come(store, rank, 3)))
    assert again == [Answer(True)] * 3


def test_a_failure_of_an_earlier_start_is_not_one_of_the_next() -> None:
    """Whichever of the two the rank says it in: both, or the one that nobody led."""
    store = dist.HashStore()
    pace.Place(store, "start").open("killed")
    assert Meeting(store, 1, 2, 10.0).fail("start", "no disk", 0.1) is None
    late = lambda rank: after(0.5 * rank, lambda: come(store, rank, 2))  # noqa: E731
    assert together(2, late) == [Answer(True)] * 2
    assert "no disk" not in come(store, 0, 2, 0.1).text  # it came again since


def test_rank_0_says_what_a_rank_left_that_ended_before_it_came() -> None:
    store = dist.HashStore()
    assert Meeting(store, 1, 2, 10.0).fail("start", "no disk", 0.1) is None
    text = come(store, 0, 2, 0.2).text
    assert "rank 1 did not come" in text
    assert "rank 1 ended before, in this start or an earlier one: no disk" in text


def test_a_rank_that_fails_after_it_came_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where rank 0 has said meanwhile whom it waits for, and this one was there."""
    monkeypatch.setattr(pace, "SAY", 0.3)
    store = dist.HashStore()

    def comes_and_fails() -> Answer | None:
        place = pace.Place(store, "start")
        place.waited_for("start/lead", 5)
        place.look()
        place.put("rank/1", facts(a=1).record())
        place.add("came", 1)
        time.sleep(1.0)
        return Meeting(store, 1, 3, 10.0).fail("start", "interrupted", 10.0)

    found = together(2, lambda rank: comes_and_fails() if rank else come(store, 0, 3))
    assert found == [Answer(False, "rank 1 failed at the start: interrupted", (1,))] * 2


def test_a_refusal_counts_for_a_late_rank_while_rank_0_is_there() -> None:
    store = dist.HashStore()
    found = together(
        2,
        lambda rank: (
            after(0.1, lambda: come(store, 1, 2))
            if rank
            else Meeting(store, 0, 2, 10.0).fail("start", "no disk", 10.0)
        ),
    )
    assert found == [Answer(False, "rank 0 failed at the start: no disk", (0,))] * 2


def test_a_late_rank_without_a_next_start_says_what_ended_the_earlier_one() -> None:
    store, said = dist.HashStore(), list[str]()
    Meeting(store, 0, 2, 10.0).fail("start", "no disk", 0)
    text = come(store, 1, 2, 0.5, say=said.append).text
    assert "rank 0 did not come" in text
    assert text.endswith("ended with: rank 0 failed at the start: no disk")
    assert said[0].startswith("an earlier start ended; waiting for rank 0 to start again; ")


starts = st.lists(
    st.tuples(st.sampled_from(["fine", "differ", "absent", "fails", "killed"]), st.integers(0, 2)),
    max_size=3,
)


@settings(max_examples=8, deadline=None)
@given(starts, st.lists(st.sampled_from([0.0, 0.05, 0.2]), min_size=3, max_size=3), st.booleans())
def test_starts_over_one_store_never_mix_their_answers(
    earlier: list[tuple[str, int]], waits: list[float], one_process: bool
) -> None:
    """Whatever became of earlier starts, and whether their processes are new: the last is fine."""
    store = dist.HashStore()
    past: list[set[str]] = [set() for _ in range(3)]

    def start(number: int, how: str, who: int, rank: int) -> Answer | None:
        time.sleep(waits[rank])
        mine = past[rank] if one_process else set()
        if how == "killed" and rank == who:
            if rank == 0:
                pace.Place(store, "start").open(f"killed {number}")
            return None
        if how == "absent" and rank == who:
            return None
        patience = 0.6 if how in ("absent", "killed") else 10.0  # a busy machine is late
        part = Meeting(store, rank, 3, patience, past=mine)
        if how == "fails" and rank == who:
            return part.fail("start", f"sentence {number}", 5.0)
        one = facts(number=number, a=rank if how == "differ" else 0)
        return part.agree(subject("start", Flags()), one.record(), one.whole)

    for number, (how, who) in enumerate(earlier):
        found = together(3, lambda rank: start(number, how, who, rank))  # noqa: B023
        for one in found:
            assert one is None or one.fine == (how == "fine")
            if how == "fails":
                # A rank that comes when rank 0 has gone cannot know of which start that was.
                assert one.text.endswith(f"rank {who} failed at the start: sentence {number}")
    assert together(3, lambda rank: start(9, "last", 0, rank)) == [Answer(True)] * 3


def test_the_patience_of_rank_0_counts_and_it_says_once_whom_it_waits_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pace, "SAY", 0.2)
    store, said = dist.HashStore(), list[str]()
    found = together(
        3,
        lambda rank: after(
            1.5 if rank == 2 else 0,
            lambda: come(store, rank, 3, (10.0, 0.3, 0.3)[rank], say=said.append),
        ),
    )
    assert found == [Answer(True)] * 3
    assert said == ["waiting for rank 2, for up to 10 s after the last that came"]


def test_a_rank_0_that_ends_without_an_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "LOST", 0.4)
    store = dist.HashStore()
    pace.Place(store, "start").open("killed")
    assert come(store, 1, 2, 0.3).text.startswith("rank 0 ended while the ranks compared")


def test_ranks_wait_as_long_as_torch_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alike, "_arguments", lambda: None)
    state = alike._State(None, None)
    assert alike._patience(state) >= 600
    state.timeout = timedelta(minutes=45)
    assert alike._patience(state) == 45 * 60
    state.timeout = timedelta(seconds=5)
    assert 60 <= alike._patience(state) < 45 * 60
    state.patience = 3.0
    assert alike._patience(state) == 3.0


@pytest.mark.parametrize("word", ["ten", "0", "-1", "nan", "inf", "10 s", "1e7"])
def test_a_start_timeout_that_is_no_number_of_seconds_is_refused(
    word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EP_PLUGIN_START_TIMEOUT", word)
    with pytest.raises(ConfigError, match="EP_PLUGIN_START_TIMEOUT must be a number") as refused:
        alike.patience_given()
    assert repr(word) in str(refused.value)
    monkeypatch.setenv("EP_PLUGIN_START_TIMEOUT", "2.5")
    assert alike.patience_given() == 2.5


def test_a_checkout_and_an_installed_package_have_one_hash(tmp_path: Path) -> None:
    """Recipes and patches are links in a checkout, and folders in a wheel."""
    code = sources._PLUGIN
    skip = shutil.ignore_patterns("__pycache__")
    shutil.copytree(code, tmp_path / "checkout" / "ep_plugin", symlinks=True, ignore=skip)
    for name in ("recipes", "patches"):
        shutil.copytree(code.parent / name, tmp_path / "checkout" / name, ignore=skip)
    shutil.copytree(tmp_path / "checkout" / "ep_plugin", tmp_path / "installed")
    inside = tmp_path / "installed" / "commands" / "recipes" / "files" / "recipes"
    (inside / "a.py").write_text("x = 1\n")
    checkout, installed = (
        sources.hash_of(tmp_path / name, content=True)
        for name in ("checkout/ep_plugin", "installed")
    )
    assert checkout == installed


@pytest.mark.parametrize("name", environment.TOGETHER)
def test_how_ranks_of_a_host_reach_each_other_may_differ_between_hosts(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = of(BASE)
    monkeypatch.setenv(name, "1")
    other = of(BASE)
    assert answer([one, replace(other, host="another")]) == Answer(True)
    assert f"{name} (rank 0 has nothing, rank 1 has 1)" in answer([one, other]).text


def layers(*numbers: int) -> torch.nn.ModuleList:
    made = []
    for number in numbers:
        layer = TransformerLayer.__new__(TransformerLayer)
        torch.nn.Module.__init__(layer)
        layer.layer_number = number
        made.append(layer)
    return torch.nn.ModuleList(made)


def built(kind: type, *numbers: int, further: tuple[int, ...] = ()) -> torch.nn.Module:
    module: Any = object.__new__(kind)
    torch.nn.Module.__init__(module)
    module.config = parse()  # for its number of layers
    module.config.num_layers = 8
    module.decoder = torch.nn.Module()
    module.decoder.layers = layers(*numbers)
    if further:
        module.encoder = layers(*further)
    return module


def test_layers_are_counted_in_a_gpt_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    place = {"tp": 0, "pp": 0, "ep": 0, "etp": 0}
    monkeypatch.setattr(model, "_place", lambda: place)
    hybrid = built(torch.nn.Module, 2, 5, 8)
    two_stacks = built(torch.nn.Module, *range(1, 9), further=(1, 2, 3, 4))
    for module in (hybrid, two_stacks):
        assert models(*[model.held([module])] * 2) == Answer(True)
    assert models(*[model.held([built(GPTModel, *range(1, 9))])] * 2) == Answer(True)
    assert "hold 3 layers" in models(*[model.held([built(GPTModel, 2, 5, 8)])] * 2).text


def test_what_a_rank_may_not_look_at_is_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "vocab").write_text("a")
    there = of(parse("--vocab-file", str(tmp_path / "vocab")))

    def denied(self: Path, *rest: Any, **more: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(self))

    with monkeypatch.context() as patched:
        for name in ("is_file", "is_dir", "stat"):
            patched.setattr(Path, name, denied)
        patched.setattr("ep_plugin.megatron.ranks.compared.host", lambda: there.host)
        patched.setattr(versions, "script", lambda: there.warn["files:the script"])
        hidden = of(parse("--vocab-file", str(tmp_path / "vocab"), "--load", str(tmp_path)))
    assert hidden.must["content:vocab_file"] == hidden.must["content:load"] == "?"
    long = "{" + "x" * 300 + "}"
    assert of(parse("--tokenizer-model", long)).must["content:tokenizer_model"] == long


@dataclass
class Recipe:
    """Holds a set, as settings of quantization do."""

    names: set[str] = field(default_factory=set)
    made_by: Any = None
    hidden: int = field(default=0, repr=False)


def test_sets_inside_objects_have_one_text() -> None:
    one, other = (set(order) for order in ("abcdefghij", "jihgfedcba"))
    order = [sys.intern(word) for word in sorted(one)]
    for wrapped in (Recipe, lambda names: {"k": [Recipe(names)]}):
        assert ", ".join(map(repr, order)) in text_of(wrapped(one))
        assert text_of(wrapped(one)) == text_of(wrapped(other))
    assert text_of(Recipe(hidden=1)) == text_of(Recipe())
    assert text_of(Recipe({"a"})) != text_of(Recipe({"b"}))
    assert text_of(Recipe(made_by=lambda: 0)).endswith("<lambda>)")
    assert "0x" not in text_of(functools.partial(print, 1))


def test_of_an_index_of_data_only_both_ends_are_read(tmp_path: Path) -> None:
    def data(name: str, at: int) -> Any:
        index = bytearray(1 << 15)
        index[at] = 1
        (tmp_path / f"{name}.idx").write_bytes(index)
        (tmp_path / f"{name}.bin").write_text("tokens")
        return of(parse("--data-path", str(tmp_path / name)))

    assert answer([data("a", 1 << 14), data("b", 1 << 13)]).fine
    assert not answer([data("a", 1), data("b", 2)]).fine
    assert not answer([data("a", -1), data("b", -2)]).fine


@pytest.fixture
def state(monkeypatch: pytest.MonkeyPatch) -> alike._State:
    found = alike._State(type("Layer", (), {"used": True}), None)
    monkeypatch.setattr(alike, "_state", lambda: found)
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "a")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "1")
    return found


def test_a_refusal_after_the_last_meeting_is_rank_0_s_to_say(
    state: alike._State, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alike, "_place_to_tell", lambda: None)  # nobody hears
    refusal.say(ConfigError("wrong"), "error: ")
    assert capsys.readouterr().err == "error: wrong\n"
    state.next, state.told = None, False
    refusal.say(ConfigError("wrong"), "error: ")
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "0")
    refusal.say(ConfigError("wrong"), "error: ")
    assert capsys.readouterr().err == "error: wrong\n"


@pytest.mark.parametrize("step", ["start", "model", "in setup", "over"])
def test_an_error_is_told_where_the_others_will_meet(
    step: str, state: alike._State, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[float] = []

    class Part:
        def fail(self, name: str, sentence: str, wait: float) -> None:
            told.append(wait)

    monkeypatch.setattr(alike, "_place_to_tell", lambda: (None, 1, 2))
    monkeypatch.setattr(alike, "_meeting", lambda *where: Part())
    monkeypatch.setattr(sys, "last_value", ValueError("x"), raising=False)
    state.next = {"start": alike.START, "over": None}.get(step, alike.MODEL)
    state.in_setup = step == "in setup"
    alike._tell_of_an_error()
    assert told == ([30.0] if step in ("start", "in setup") else [])
    state.told = False
    told.clear()
    alike.tell("a refusal")  # is told, without a long wait where the others may never meet
    assert told == {"over": [], "model": [2.0]}.get(step, [30.0])
