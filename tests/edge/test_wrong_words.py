"""A wrong word behind a flag of ours in Megatron's parser: one sentence, once, and exit code 2."""

import argparse
import re

import pytest

from ep_plugin.megatron.arguments.parser import READERS, add_ep_arguments
from ep_plugin.megatron.arguments.table import TABLE, Argument


@pytest.fixture(autouse=True)
def _one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)


def parser() -> argparse.ArgumentParser:
    """Return a parser with two flags of somebody else's, and all of ours."""
    found = argparse.ArgumentParser("script.py")
    found.add_argument("--num-layers", type=int)
    found.add_argument("--moe-token-drop-policy", choices=("probs", "position"))
    return add_ep_arguments(found)


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        parser().parse_args(words)
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    return said.err


def takes_any_word(row: Argument) -> bool:
    """Whether a row's value is a name, which is looked up later."""
    if row.flag in READERS:
        return READERS[row.flag][0] is str
    return row.hint not in (int, float, bool) and row.legal is None


VALUED = [row for row in TABLE if row.default is not False and not takes_any_word(row)]


@pytest.mark.parametrize("flag", [row.flag for row in VALUED])
def test_the_sentence_has_the_flag_what_was_typed_and_what_to_type(
    flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused([flag, "<topk>x"], capsys)
    found = re.fullmatch(
        rf"ep_plugin: error: {flag} must be .*; got '<topk>x'; use {flag} (\S+)\n", said
    )
    assert found is not None, said
    parser().parse_args([flag, found[1]])


def test_there_are_flags_of_every_kind() -> None:
    assert {int, float, bool} <= {row.hint for row in VALUED}
    assert any(row.legal for row in VALUED)
    assert len(VALUED) > 40


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("--ep-capacity-factor", "--ep-capacity-factor needs a value; use --ep-capacity-factor V"),
        ("--ep-preset", "--ep-preset needs a value; use --ep-preset V"),
        ("--ep-audit-save=3", "--ep-audit-save takes no value; use --ep-audit-save alone"),
        ("--ep-capcity-factor 1", "'--ep-capcity-factor' is no flag here; use --ep-capacity-fact"),
        ("--ep-capacity 1", "ambiguous option: --ep-capacity could match --ep-capacity-factor, "),
        ("--ep-experts-per-layer 0", "--ep-experts-per-layer must name at least 1 expert a layer"),
    ],
)
def test_other_mistakes_too(line: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(line.split(), capsys)
    assert said.startswith(f"ep_plugin: error: {sentence}")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--num-layers two", "argument --num-layers: invalid int value: 'two'"),
        ("--moe-token-drop-policy x", "argument --moe-token-drop-policy: invalid choice: 'x' "),
        ("--unknown --ep-unknown", "unrecognized arguments: --unknown --ep-unknown"),
        ("--num-layers", "argument --num-layers: expected one argument"),
    ],
)
def test_what_argparse_says_of_other_flags_stays(
    line: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(line.split(), capsys)
    assert said.startswith("usage: script.py ")
    assert f"\nscript.py: error: {message}" in said
