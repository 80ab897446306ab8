"""`ep-plugin generate`: layouts, prompts and stop texts, without a rank."""

import argparse
import os
from importlib import import_module
from pathlib import Path
from typing import Any

import hf_models
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ep_plugin.checkpoint.text import Numbers, choose
from ep_plugin.commands.generate import _tell, _texts
from ep_plugin.commands.generate.layout import layout_of
from ep_plugin.commands.generate.source import opened
from ep_plugin.commands.generate.start import Killed
from ep_plugin.errors import ConfigError
from ep_plugin.megatron.workers.generate_ranks import ORDER
from ep_plugin.megatron.workers.generate_run import UNREAD, _write
from ep_plugin.megatron.workers.shown_text import Growing, Shown
from ep_plugin.moe.groups import expert_grid
from ep_plugin.moe.parallel import ParallelConfig

pytestmark = pytest.mark.megatron


def model(num_experts: int | None = 4, **own: Any) -> argparse.Namespace:
    sizes = {"num_attention_heads": 8, "ffn_hidden_size": 64, "padded_vocab_size": 128}
    return argparse.Namespace(**{**sizes, "num_experts": num_experts, **own})


def asked(**own: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"tp": 1, "ep": 1, "etp": None, "pp": 1, **own})


@pytest.mark.parametrize(
    ("typed", "experts", "says"),
    [
        ({"pp": 2}, 4, r"--pp \(2\) is not served"),
        ({"tp": 3}, 4, "--tp .3. must divide the 8 attention heads; use --tp 2"),
        ({"ep": 2}, None, "--ep .2. is about experts, and this model has none"),
        ({"ep": 6}, 4, "does not slice them evenly; use --ep 4"),
        ({"ep": 3}, 4, "--ep .3. must divide the number of experts .*; use --ep 2"),
        ({"ep": 2, "etp": 5}, 4, "cannot be cut into 5 slices; use --etp 4"),
        ({"ep": 0}, 4, "--ep must be from 1"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(
    typed: dict[str, int], experts: int | None, says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        layout_of(asked(**typed), model(experts))


@settings(max_examples=200, derandomize=True, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 16))
def test_what_a_refusal_says_to_use_is_taken(ep: int, experts: int, tp: int) -> None:
    typed = {"ep": ep, "tp": tp}
    for _ in range(4):
        try:
            found = layout_of(asked(**typed), model(experts))
        except ConfigError as error:
            name, value = str(error).rpartition("; use --")[2].split()
            typed[name] = int(value)
        else:
            break
    assert found.ep * found.etp == typed["ep"]
    assert experts % found.ep == 0


def test_what_may_take_a_minute_is_said_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there.model").touch()
    for typed, says in (
        ("no-such-name", "no-such-name is no file or folder here; transformers looks for"),
        (str(tmp_path / "there.model"), None),
        (str(tmp_path), None),
        ("numbers", None),
    ):
        args = argparse.Namespace(tokenizer=typed, checkpoint=tmp_path)
        _tell(choose(typed, argparse.Namespace(), tmp_path), args)
        said = capsys.readouterr().err
        assert said == "" if says is None else says in said, typed


@pytest.mark.parametrize(
    ("world", "experts", "ep", "etp"),
    [
        (8, 4, [[0, 1, 2, 3], [4, 5, 6, 7]], [[0, 4], [1, 5], [2, 6], [3, 7]]),
        (4, 2, [[0, 1], [2, 3]], [[0, 2], [1, 3]]),
        (6, 2, [[0, 1], [2, 3], [4, 5]], [[0, 2, 4], [1, 3, 5]]),
        (4, 1, [[0], [1], [2], [3]], [[0, 1, 2, 3]]),
    ],
)
def test_slices_of_experts_lie_as_in_deepspeed(
    world: int, experts: int, ep: list[list[int]], etp: list[list[int]]
) -> None:
    found = layout_of(asked(ep=world), model(experts, ffn_hidden_size=48))
    grid = expert_grid(
        ParallelConfig(world_size=found.world, ep=found.ep, etp=found.etp, order=ORDER)
    )
    assert grid.groups("ep") == ep
    assert grid.groups("etp") == etp


class Letters(Numbers):
    """A token is a letter."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, ids: Any) -> str:
        return "".join(map(chr, ids))


@settings(max_examples=300, derandomize=True, deadline=None)
@given(st.text("abc", max_size=12), st.lists(st.text("abc", min_size=1, max_size=3), max_size=3))
def test_what_is_streamed_is_the_text_before_the_first_stop(text: str, stop: list[str]) -> None:
    written: list[str] = []
    growing = Growing(Letters(), "p", [ord("p")], stop)
    shown = Shown([growing], False, written.append, lambda: 0.0)
    shown.begin()
    for place, letter in enumerate(text):
        growing.add(ord(letter))
        if place + 1 == len(text):
            growing.end("length")
        shown.update()
        if growing.reason:
            break
    ends = [n for n in range(len(text) + 1) if any(text[:n].endswith(word) for word in stop)]
    whole = text
    if ends:
        read = text[: ends[0]]
        whole = read[: min(read.find(word) for word in stop if word in read)]
    assert "".join(written).rstrip("\n") == "p" + whole
    assert growing.reason == ("stop" if ends else "length" if text else None)


def test_the_end_of_a_document_is_no_part_of_the_text() -> None:
    growing = Growing(Letters(end=ord("z")), "p", [ord("p")], [])
    for letter in "ab":
        growing.add(ord(letter))
    growing.add(ord("z"))
    assert (growing.text, growing.reason, growing.tokens) == ("ab", "end_of_document", [97, 98])


def test_numbers_are_the_only_words_of_a_model_without_tokenizer() -> None:
    assert Numbers().encode("1 22 3") == [1, 22, 3]
    for text in ("a", "-1", "1.5", "1" * 40):
        with pytest.raises(ConfigError, match="token ids such as"):
            Numbers().encode(text)


def test_a_rank_that_a_signal_ended_is_nobody_s_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 is killed; rank 0 fails for want of it."""
    (tmp_path / "dies.py").write_text(
        "import os, pathlib, sys, time\n"
        f"flag = pathlib.Path({str(tmp_path / 'flag')!r})\n"
        "if os.environ['RANK'] == '1':\n"
        "    flag.touch()\n"
        "    os.kill(os.getpid(), 9)\n"
        "while not flag.exists():\n"
        "    time.sleep(0.01)\n"
        "sys.exit('connection closed by peer')\n"
    )
    module = import_module("ep_plugin.commands.generate.start")
    monkeypatch.setattr(module, "WORKER", "dies")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(Killed, match=r"rank 1 was ended by signal 9 \(SIGKILL\)") as caught:
        module.start({}, 2, None, tmp_path)
    assert caught.value.code == 137
    assert not isinstance(caught.value, ConfigError)


def test_a_reader_that_goes_away_ends_ranks_quietly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, write = os.pipe()
    os.close(read)
    with pytest.raises(BrokenPipeError):
        _write(write, "text")
    os.close(write)
    (tmp_path / "unread.py").write_text(f"import sys; sys.exit({UNREAD})")
    module = import_module("ep_plugin.commands.generate.start")
    monkeypatch.setattr(module, "WORKER", "unread")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(BrokenPipeError):
        module.start({}, 1, None, tmp_path)


def test_a_full_disk_is_one_sentence() -> None:
    with Path("/dev/full").open("wb") as file, pytest.raises(ConfigError, match="No space left"):
        _write(file.fileno(), "text")


def typed(**own: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"prompt": None, "prompts": None, "stop": [], **own})


def test_a_prompt_is_a_line_and_nothing_else_ends_one(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(" a\x0cb \r\n\n \r\nc\u2028d\n".encode())
    assert _texts(typed(prompts=file)) == [" a\x0cb ", "c\u2028d"]


@pytest.mark.parametrize("own", [{"prompt": ["a\udcff"]}, {"prompt": ["a"], "stop": ["\udcff"]}])
def test_bytes_that_are_no_text_are_refused(own: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="bytes that are not UTF-8"):
        _texts(typed(**own))


@pytest.mark.parametrize("case", ["llama", "mixtral"])
def test_a_hugging_face_model_was_trained_with_no_router_of_one_s_own(
    case: str, tmp_path: Path
) -> None:
    folder = hf_models.save(case, tmp_path / "hf")
    assert opened(folder, None).convert
    with pytest.raises(ConfigError, match="is a Hugging Face model; leave --router out"):
        opened(folder, "my_moe.router")
