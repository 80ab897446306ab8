"""Counts and sizes in a unit that fits: none of a tiny model is printed as 0."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ep_plugin.cli import main
from ep_plugin.commands.numbers import rounded, short_count

UNITS = {"K": 1e3, "M": 1e6, "B": 1e9}
TINY = ["plan", "--preset", "qwen3-nano", "--gpus", "4", "--ep", "2"]


def read(text: str) -> float:
    return float(text.rstrip("KMB")) * UNITS.get(text[-1], 1)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        *((0, "0"), (1, "1"), (999, "999"), (1000, "1K"), (45_123, "45.12K"), (999_960, "1M")),
        *((12_300_000, "12.3M"), (999_999_999, "1B"), (671_026_419_200, "671B")),
        (1_571_000_000_000, "1571B"),
    ],
)
def test_counts(count: int, text: str) -> None:
    assert short_count(count) == text


@given(st.integers(0, 10**13))
@settings(database=None)
def test_a_count_can_be_read_back(count: int) -> None:
    text = short_count(count)
    assert len(text) <= 6
    assert read(text) == pytest.approx(count, rel=6e-4)


@given(st.floats(1e-12, 1e6), st.integers(0, 3))
@settings(database=None)
def test_what_is_above_zero_is_not_printed_as_zero(value: float, decimals: int) -> None:
    assert float(rounded(value, decimals)) == pytest.approx(
        value, rel=0.06, abs=0.5 * 10**-decimals
    )
    assert float(rounded(value, decimals)) > 0
    assert rounded(0.0, 1) == "0.0"


def test_the_plan_of_a_tiny_model_has_no_zeros(capsys: pytest.CaptureFixture[str]) -> None:
    """And says what its JSON says, which has plain numbers."""
    assert main([*TINY, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert main(TINY) == 0
    said = capsys.readouterr().out.splitlines()[1].split()
    held = row["memory"]
    assert [read(text) for text in said[3:5]] == pytest.approx(
        [held["dense_params"], held["expert_params"]], rel=6e-4
    )
    assert [float(text) for text in said[5:9]] == pytest.approx(
        [held[name] / 1e9 for name in ("weights", "optimizer", "activations")] + [row["total_gb"]],
        rel=0.06,
    )


def test_a_tiny_teacher_and_a_tiny_hybrid_model_have_none(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*TINY, "--ep-teacher", "qwen3-nano"]) == 0
    teacher = capsys.readouterr().out.splitlines()[3].split()
    assert all(read(text) > 1000 for text in teacher[2:4])
    assert all(float(text) > 0 for text in teacher[4:6])
    sizes = (
        *("--hidden-size", "64", "--num-attention-heads", "8", "--vocab-size", "1000"),
        *("--seq-length", "32", "--position-embedding-type", "rope"),
    )
    assert main(["plan", "--hybrid-layer-pattern=*-", *sizes]) == 0
    said = capsys.readouterr().out.splitlines()
    (at,) = (number for number, line in enumerate(said) if line.startswith("  ep  edp stage "))
    assert all(float(text) > 0 for text in said[at + 1].split()[3:8])
