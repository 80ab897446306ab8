"""No command line, however odd, ends in a traceback: one sentence and exit code 2, or it acts."""

import os
from pathlib import Path

import hostile_lines as hostile
import pytest
from hypothesis import HealthCheck, given, settings


@pytest.mark.parametrize("command", hostile.COMMANDS)
def test_every_line_acts_or_ends_in_one_sentence(command: str, tmp_path: Path) -> None:
    here = tmp_path / "a" / "b" / "c"  # words that begin with .. stay in the test's folder
    here.mkdir(parents=True)
    hostile.fill(here)
    before = Path.cwd()

    @settings(
        max_examples=60,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(hostile.lines(command))
    def check(words: list[str]) -> None:
        ended = hostile.run(words)
        assert not ended.fault, (words, ended.fault)

    os.chdir(here)
    try:
        with hostile.without_work():
            check()
    finally:
        os.chdir(before)
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith("tmp")]


def test_a_line_that_fails_is_seen() -> None:
    assert hostile.Ended(70, "", "").fault
    assert hostile.Ended(2, "", "two\nlines").fault
    assert hostile.Ended(2, "", "ep-plugin plan: error: a\nep-plugin plan: error: b").fault
    assert hostile.Ended(2, "", "usage: x\nep-plugin plan: error: b\n").fault
    assert not hostile.Ended(2, "", "ep-plugin plan: error: b\n").fault


@pytest.mark.parametrize(
    "words",
    [
        *(["plan", "--compute-ms", value] for value in ("nan", "inf", "1e31")),
        ["plan", "--preset", "mixtral-8x7b", "--gpu-gb", "nan"],
        ["plan", "--ep", "2", str(10**30)],
        ["report", "--run", ".", "--experts", str(2**31)],
    ],
)
def test_numbers_that_nothing_can_count_with_are_refused(words: list[str]) -> None:
    ended = hostile.run(words)
    assert (ended.code, ended.fault) == (2, "")
    assert "must be a number up to " in ended.err
