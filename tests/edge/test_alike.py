"""Ranks compare, in threads over one store: what differs is refused with its ranks and values."""

import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import stored
import torch
import torch.distributed as dist
from flag_values import parser
from hypothesis import given, settings
from hypothesis import strategies as st
from meetings import BASE, PATIENCE, answer, facts, models, of, parse, together

from ep_plugin.megatron.arguments.digest import OWN, PLACES, READ, TOGETHER
from ep_plugin.megatron.arguments.table import TYPED
from ep_plugin.megatron.ranks import environment, model
from ep_plugin.megatron.ranks import store as pace
from ep_plugin.megatron.ranks.answers import Answer, ranges
from ep_plugin.megatron.ranks.compared import Compared, of_settings, subject
from ep_plugin.megatron.ranks.meeting import Meeting
from ep_plugin.megatron.ranks.sentence import Flags, flags_of
from ep_plugin.megatron.ranks.store import Place
from ep_plugin.megatron.settings import EdgeSettings

pytestmark = [pytest.mark.megatron, pytest.mark.newest]
LISTED = OWN.keys() | PLACES.keys() | TOGETHER.keys() | READ.keys()


def other_than(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, (int, float)) else f"{value} or another"


NAMES = sorted({a.dest for a in parser()._actions} - LISTED - {"help"})


@pytest.mark.parametrize("part", range(20))
def test_every_argument_of_megatron_s_parser_is_refused_where_one_rank_has_another(
    part: int,
) -> None:
    base, flags = of(BASE), flags_of(parser())
    for name in NAMES[part::20]:
        changed = parse()
        setattr(changed, name, other_than(getattr(changed, name)))
        found = answer([base, of(changed)], flags=flags)
        assert not found.fine, name
        assert f"{flags.first[name]} (rank" in found.text, (name, found.text)


def test_what_the_ranks_have_of_a_setting_is_in_the_words_that_were_typed() -> None:
    rest = ("--ep-overlap-chunks", "3", "--lr", "1e-3")
    three = [of(parse("--ep-topk", "2", *rest))] * 3
    found = answer(
        [*three, of(parse("--ep-topk", "4", *rest, "--fp16")), three[0]], flags=flags_of(parser())
    )
    assert "--ep-topk (ranks 0-2 and 4 have 2, rank 3 has 4)" in found.text
    assert "--fp16 (rank 3 has it, ranks 0-2 and 4 do not)" in found.text
    assert "--lr" not in found.text
    assert found.text.endswith("start every rank with the same command line")


def test_settings_that_follow_from_a_typed_one_are_counted() -> None:
    one, other = parse("--hidden-size", "64"), parse("--hidden-size", "32")
    one.kv_channels, other.kv_channels = 32, 16
    text = answer([of(one), of(other)], flags=flags_of(parser())).text
    assert "--hidden-size (rank 0 has 64, rank 1 has 32); 1 more that follow from these" in text


def test_many_differences_are_named_up_to_a_limit() -> None:
    names = {f"a{n}": n for n in range(9)}
    text = answer([facts(**names), facts(**{name: -1 for name in names})]).text
    assert text.count("(rank 0 has") == 6
    assert "and 3 more" in text


@pytest.mark.parametrize("name", sorted(LISTED - TOGETHER.keys() - READ.keys() - {TYPED}))
def test_what_may_differ_is_not_refused(name: str) -> None:
    one, other = parse(), parse()
    setattr(one, name, "a")
    setattr(other, name, "b")
    assert answer([of(one), of(other)]) == Answer(True)


@pytest.mark.parametrize("name", sorted(PLACES))
def test_whether_a_place_is_given_must_be_alike(name: str) -> None:
    one, other = parse(), parse()
    setattr(one, name, "a")
    setattr(other, name, None)
    assert not answer([of(one), of(other)]).fine


@pytest.mark.parametrize("name", sorted(TOGETHER))
def test_ranks_of_one_host_write_to_one_folder_and_hosts_may_know_it_by_two_names(
    name: str,
) -> None:
    one, other = parse(), parse()
    setattr(one, name, "/a")
    setattr(other, name, "/b")
    here, there = of(one), of(other)
    assert "(rank 0 has /a, rank 1 has /b)" in answer([here, there]).text
    assert answer([here, replace(there, host="another")]).fine
    assert answer([here, here, *[replace(there, host="another")] * 2]).fine


def test_folders_to_load_must_hold_one_iteration(tmp_path: Path) -> None:
    def loads(folder: str, iteration: str | None) -> Compared:
        (tmp_path / folder).mkdir(exist_ok=True)
        if iteration is not None:
            tracker = tmp_path / folder / "latest_checkpointed_iteration.txt"
            tracker.write_text(iteration)
            (tmp_path / folder / f"iter_{int(iteration):07d}").mkdir(exist_ok=True)
        return of(parse("--load", str(tmp_path / folder)))

    one = loads("a", "4")
    assert answer([one, loads("b", "4")]).fine
    text = answer([one, loads("c", "8")], flags=flags_of(parser())).text
    assert "the checkpoint of --load (rank 0 has iteration 4, rank 1 has iteration 8)" in text
    assert "rank 1 has no checkpoint" in answer([one, loads("d", None)]).text
    (tmp_path / "a" / "iter_0000004" / "common.pt").write_bytes(b"one run")
    (tmp_path / "b" / "iter_0000004" / "common.pt").write_bytes(b"another")
    assert not answer([loads("a", "4"), loads("b", "4")]).fine


@pytest.mark.parametrize("same", [True, False])
def test_folders_of_newer_releases_hold_one_run(same: bool, tmp_path: Path) -> None:
    """One iteration of the same sizes, of another run: nothing but values differs."""
    found = []
    for name in "ab":
        content = stored.healthy()
        if name == "b" and not same:
            content.add(stored.NORM, torch.full((stored.H,), 2.0))
        folder = stored.write(content, tmp_path / name)
        found.append(of(parse("--load", str(folder))))
    assert answer(found).fine == same


@pytest.mark.parametrize("flag", ["--vocab-file", "--merge-file", "--tokenizer-model"])
def test_files_that_are_read_may_lie_elsewhere_and_hold_the_same(flag: str, tmp_path: Path) -> None:
    for name, content in (("a", "x" * 9), ("b", "x" * 9), ("c", "y" * 9)):
        (tmp_path / name).write_text(content)
    a, b, c = (of(parse(flag, str(tmp_path / name))) for name in "abc")
    assert answer([a, b]).fine
    assert f"what {flag} names (rank 0 has 9 bytes" in answer([a, c], flags=flags_of(parser())).text


def test_data_may_lie_elsewhere_and_be_unknown_to_a_rank_and_hold_the_same(tmp_path: Path) -> None:
    def data(folder: str, index: str, weight: str = "0.5") -> Compared:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "d.idx").write_text(index)
        (tmp_path / folder / "d.bin").write_text("tokens")
        return of(parse("--data-path", weight, str(tmp_path / folder / "d")))

    one = data("a", "index")
    assert answer([one, data("b", "index")]).fine
    assert answer([one, of(parse("--data-path", "0.5", "/nowhere/d"))]).fine
    assert not answer([one, data("c", "other")]).fine
    assert not answer([one, data("d", "index", "0.6")]).fine


@pytest.mark.parametrize("name", [*environment.MUST, "NVTE_FUSED_ATTN", "NVTE_NEW"])
def test_variables_that_change_numbers_or_collectives_are_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = of(BASE)
    monkeypatch.setenv(name, "another")
    found = answer([one, of(BASE)])
    assert not found.fine
    assert f"{name} (rank 0 has" in found.text


TORCH: dict[str, Callable[[], object]] = {
    "default_dtype": lambda: torch.set_default_dtype(torch.float64),
    "deterministic": lambda: torch.use_deterministic_algorithms(True),
    "fp32_precision": lambda: torch.set_float32_matmul_precision("medium"),
    "cuda.matmul.fp32_precision": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "mkldnn.enabled": lambda: setattr(torch.backends.mkldnn, "enabled", False),
    "bf16_reduced": lambda: setattr(
        torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False
    ),
    "flash_sdp": lambda: torch.backends.cuda.enable_flash_sdp(False),
}


@pytest.mark.parametrize("name", TORCH)
def test_what_a_script_sets_of_torch_on_one_rank_is_refused(name: str) -> None:
    """In a child: nothing of torch's is left set here."""
    one, (read, write) = of(BASE), os.pipe()
    if (pid := os.fork()) == 0:
        TORCH[name]()
        os.write(write, answer([one, of(BASE)]).text.encode())
        os._exit(0)
    os.close(write)
    os.waitpid(pid, 0)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    assert re.search(rf"alike in torch\.[^;]*{name}", said), said
    assert "let every rank's script set torch alike" in said


@pytest.mark.parametrize(
    ("name", "warned"),
    [
        *((name, True) for name in (*environment.WARN, "NCCL_CROSS_NIC", "UB_SKIPMC")),
        *((name, False) for name in ("NCCL_DEBUG", "NCCL_SOCKET_IFNAME", "NVTE_DEBUG_LEVEL")),
        *((name, False) for name in ("HOME", "CUDA_VISIBLE_DEVICES", "EP_PLUGIN_CACHE")),
    ],
)
def test_other_variables_are_warned_of_or_a_host_s_own(
    name: str, warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "one")
    one = of(BASE)
    monkeypatch.setenv(name, "another")
    found = answer([one, of(BASE)])
    assert found.fine
    assert (f"the ranks differ in {name}" in found.text) == warned


def test_versions_and_sources_are_compared() -> None:
    one = of(BASE)
    for name in ("torch", "ep_plugin", "megatron-core", "Python", "NumPy"):
        kind = f"version:{name}"
        changed = replace(one, must=one.must | {kind: "9.9"})
        text = answer([one, changed]).text
        assert f"the version of {kind[8:]} (" in text
        assert "rank 1 has 9.9" in text
    for name in ("the files of ep_plugin", "the files of Megatron"):
        assert len(one.must[f"files:{name}"]) >= 12
        changed = replace(one, must=one.must | {f"files:{name}": "0"})
        assert f"{name} (" in answer([one, changed]).text


def test_two_checkouts_of_one_version_are_seen(tmp_path: Path) -> None:
    from ep_plugin.sources import hash_of

    for name, line in (("a", "x = 1\n"), ("b", "x = 1\n"), ("c", "x = 2\n")):
        (tmp_path / name / "part").mkdir(parents=True)
        (tmp_path / name / "part" / "file.py").write_text(line)
    a, b, c = (hash_of(tmp_path / name, content=True) for name in "abc")
    assert a == b != c


def test_arguments_of_the_script_s_own_are_warned_of() -> None:
    one, other = parse(), parse()
    one.my_port, other.my_port = 1, 2
    found = answer([of(one, own=("my_port",)), of(other, own=("my_port",))])
    assert found.fine
    assert "warning: the ranks differ in args.my_port (rank 0 has 1, rank 1 has 2)" in found.text


def test_loops_without_arguments_compare_settings_and_groups() -> None:
    def loop(topk: int, ep: int) -> Compared:
        given = EdgeSettings(routing={"topk": topk})
        return of_settings(given, {"expert_model_parallel_size": ep}, 2)

    assert answer([loop(2, 2), loop(2, 2)]).fine
    assert "routing['topk'] (rank 0 has 2, rank 1 has 4)" in answer([loop(2, 2), loop(4, 2)]).text
    assert "expert_model_parallel_size (" in answer([loop(2, 2), loop(2, 1)]).text


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1)), min_size=2, max_size=9))
def test_every_value_stands_with_its_ranks(values: list[tuple[int, int]]) -> None:
    found = answer([facts(a=a, b=b) for a, b in values])
    for name, column in (("a", [a for a, _ in values]), ("b", [b for _, b in values])):
        differs = len(set(column)) > 1
        assert (f"args.{name} (" in found.text) == differs
        for value in set(column) if differs else ():
            ranks = [rank for rank, has in enumerate(column) if has == value]
            verb = "rank {} has {}" if len(ranks) == 1 else "ranks {} have {}"
            said = found.text.partition(f"args.{name} (")[2].partition(")")[0]
            assert verb.format(ranges(ranks), value) in said
    assert found.fine == (len(set(values)) == 1)


@settings(max_examples=200, deadline=None)
@given(st.sets(st.integers(0, 14), min_size=1))
def test_ranges_read_back(ranks: set[int]) -> None:
    words = ranges(sorted(ranks)).replace(" and ", ", ").split(", ")
    found = [range(int(w.split("-")[0]), int(w.split("-")[-1]) + 1) for w in words if w != "others"]
    read = {rank for part in found for rank in part}
    assert read == ranks or ("others" in words and read < ranks)


class Counted:
    """A store that counts the requests made through it."""

    def __init__(self, store: Any) -> None:
        self.store, self.requests = store, 0

    def __getattr__(self, name: str) -> Any:
        self.requests += 1
        return getattr(self.store, name)


def test_no_rank_but_the_first_asks_the_store_more_often_for_there_being_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pace, "FIRST_STRETCH", PATIENCE)  # looks while waiting are apart
    for differ in (False, True):
        shared = dist.HashStore()
        stores = [Counted(shared) for _ in range(64)]

        def rank_s(rank: int) -> Answer:
            one = facts(a=differ and rank == 40)  # noqa: B023
            about = subject("start", Flags())
            part = Meeting(stores[rank], rank, 64, PATIENCE)  # noqa: B023
            return part.agree(about, one.record(), one.whole)

        assert all(found.fine != differ for found in together(64, rank_s))
        assert max(store.requests for store in stores[1:]) <= 17  # of the last, which removes all


def two_of(kind: str, folder: Path) -> list[Any]:
    """Return the stores of two ranks."""
    if kind == "hash":
        return [dist.HashStore()] * 2
    if kind == "file":
        return [dist.FileStore(str(folder / "store"), 2) for _ in range(2)]
    first = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return [first, dist.TCPStore("127.0.0.1", first.port, wait_for_workers=False)]


@pytest.mark.parametrize("kind", ["hash", "file", "tcp"])
def test_a_second_meeting_does_not_read_the_first_and_keys_go(kind: str, tmp_path: Path) -> None:
    stores = two_of(kind, tmp_path)
    keys = stores[0].num_keys()
    prefixed = [dist.PrefixStore("ep_plugin", store) for store in stores]
    assert answer([facts(a=1), facts(a=1)], prefixed).fine
    assert stores[0].num_keys() == keys + 1  # the counter
    assert answer([facts(a=2), facts(a=2)], prefixed).fine
    assert not answer([facts(a=2), facts(a=3)], prefixed).fine


class Gone:
    """A store whose answer is removed right after it was seen, by the last rank that leaves."""

    def __init__(self, store: Any) -> None:
        self.store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    def check(self, keys: list[str]) -> bool:
        there = bool(self.store.check(keys))
        if there and keys[0].endswith(("/answer", "/left/1")):
            self.store.delete_key(keys[0])
        return there

    def get(self, key: str) -> bytes:
        if not self.store.check([key]):
            raise AssertionError(f"it would wait for {key}")
        return bytes(self.store.get(key))


def test_an_answer_that_goes_after_it_was_seen_is_not_waited_for() -> None:
    store = dist.HashStore()
    old = Place(store, "start")
    old.open("old")
    old.put("answer", Answer(True).as_json())
    said: list[Answer] = []
    part = Meeting(Gone(store), 1, 2, PATIENCE)

    def rank_s(rank: int) -> None:
        one, about = facts(a=1), subject("start", Flags())
        if rank == 0:
            time.sleep(0.5)
            said.append(Meeting(store, 0, 2, PATIENCE).agree(about, one.record(), one.whole))
        else:
            said.append(part.agree(about, one.record(), one.whole))

    together(2, rank_s)
    assert [answer.fine for answer in said] == [True, True]
    assert old.key in part.past


def test_what_ranks_left_is_read_in_bounds() -> None:
    store = dist.HashStore()
    place = Place(store, "start")
    for rank in range(1, 6):
        place.leave_word(rank, "x\x1b" * 100_000)
    said = place.words(range(1, 1000))
    assert said.count("ended before") == 3
    assert len(said) < 20_000
    assert said.isprintable()
    store.set("start/left/1", json.dumps("short"))
    assert Place(Gone(store), "start").words([1]).endswith(": short")
    asked: list[str] = []

    class Counting(Gone):
        def compare_set(self, key: str, *rest: str) -> bytes:
            asked.append(key)
            return bytes(self.store.compare_set(key, *rest))

    assert Place(Counting(store), "other").words(range(5000)) == ""
    assert len(asked) == 64


def test_ranks_that_do_not_come_are_named() -> None:
    store = dist.HashStore()

    def rank_s(rank: int) -> Answer:
        one = facts(a=1)
        part = Meeting(store, rank, 6, 0.3)
        return part.agree(subject("start", Flags()), one.record(), one.whole)

    for found in together(3, rank_s):
        assert "ranks 3-5 did not come within 0 s" in found.text


def test_a_first_rank_that_does_not_come_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "STRETCH", 0.2)
    store, one = dist.HashStore(), facts(a=1)
    part = Meeting(store, 1, 2, 0.2)
    found = part.agree(subject("start", Flags()), one.record(), one.whole)
    assert "rank 0 did not come" in found.text


@pytest.mark.parametrize("failing", [(0,), (1,), (2, 3), (0, 1, 2, 3)])
def test_a_rank_that_failed_before_is_named_with_its_sentence(failing: tuple[int, ...]) -> None:
    store = dist.HashStore()

    def rank_s(rank: int) -> Answer | None:
        part = Meeting(store, rank, 4, PATIENCE)
        if rank in failing:
            return part.fail("start", "there is no file x", 10)
        one = facts(a=1)
        return part.agree(subject("start", Flags()), one.record(), one.whole)

    answers = together(4, rank_s)
    assert len(set(answers)) == 1
    assert answers[0] is not None
    assert not answers[0].fine
    who = failing if 0 not in failing else (0,)  # which knows it at once
    word = "rank" if len(who) == 1 else "ranks"
    assert answers[0].text == f"{word} {ranges(who)} failed at the start: there is no file x"


def holds(place: str, **more: Any) -> model.Held:
    """Return what a rank at "tp pp ep etp" holds of a model of 4 layers and 8 experts."""
    tp, pp, ep, etp = map(int, place.split())
    fields: dict[str, Any] = {
        "dense": {f"layers.{pp}.weight": "[4, 4] float32"},
        "experts": {f"layers.{pp}.experts": "[4, 4] float32"},
        "config": {"config:hidden_size": "4"},
        "place": {"tp": tp, "pp": pp, "ep": ep, "etp": etp},
        "layers": [2 * pp + 1, 2 * pp + 2],
        "local_experts": {str(2 * pp + 1): 4},
        "all_experts": {str(2 * pp + 1): 8},
        "num_layers": 4,
    }
    return model.Held(**fields | more)


def test_models_are_compared_where_ranks_must_hold_the_same() -> None:
    whole = [holds(place) for place in ("0 0 0 0", "0 0 1 0", "0 1 0 0", "0 1 1 0")]
    assert models(*whole).fine
    wide = holds("0 0 1 0", dense={"layers.0.weight": "[8, 4] float32"})
    text = models(whole[0], wide, *whole[2:]).text
    assert (
        "at tp 0, pp 0, layers.0.weight (rank 0 has [4, 4] float32, rank 1 has [8, 4] float32)"
        in text
    )
    # Ranks of other experts may hold others; those of the same may not.
    assert models(whole[0], holds("0 0 1 0", experts={"e": "[1]"}), *whole[2:]).fine
    twin = holds("0 0 0 0", experts={"layers.0.experts": "[1]"})
    assert "at pp 0, ep 0, etp 0, layers.0.experts (rank 0" in models(*whole, twin).text
    other = holds("0 1 1 0", config={"config:hidden_size": "5"})
    text = models(*whole[:3], other).text
    assert "hidden_size (ranks 0-2 have 4, rank 3 has 5)" in text
    assert text.endswith("(TransformerConfig)")
    late = holds("0 1 1 0", config={"config:hidden_size": "4", "switch:torch.set_x": "True"})
    text = models(*whole[:3], late).text
    assert "torch.set_x (ranks 0-2 have nothing, rank 3 has True)" in text
    assert text.endswith("let every rank's script set torch alike")


def test_switches_of_torch_that_are_set_after_the_start_are_compared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(model, "_place", dict)  # there are no groups here
    layer = torch.nn.Linear(2, 2)
    before = model.held([layer]).config
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", not torch.backends.mkldnn.enabled)
    name = "switch:torch.backends.mkldnn.enabled"
    assert model.held([layer]).config == before | {name: str(torch.backends.mkldnn.enabled)}
    assert before[name] != model.held([layer]).config[name]


def test_layers_and_experts_add_up() -> None:
    whole = [holds(place) for place in ("0 0 0 0", "0 0 1 0", "0 1 0 0", "0 1 1 0")]
    twice = [holds(place, layers=[2, 3]) for place in ("0 1 0 0", "0 1 1 0")]
    assert "the stages hold 4 layers (1-3), and the model has 4" in models(*whole[:2], *twice).text
    few = holds("0 0 1 0", local_experts={"1": 3})
    text = models(whole[0], few, *whole[2:]).text
    assert "layer 1 has 7 experts on all ranks together, and should have 8" in text
