"""docs/hostile-files.md shows what a run counted."""

import json
from pathlib import Path

from tests.hostile import called, record, trees
from tests.hostile.opcodes import MARK

ROOT = Path(__file__).parents[2]
KEPT = json.loads((ROOT / "benchmarks" / "results" / "hostile.json").read_text())
PAGE = (ROOT / "docs" / "hostile-files.md").read_text()
KINDS = (
    "pickles and archives",
    "JSON and text",
    "safetensors headers",
    "settings",
    "command lines",
    "metadata of models",
)


def test_the_page_shows_the_counts_that_were_kept() -> None:
    assert record.table(KEPT) in PAGE
    for fact in (KEPT["date"], KEPT["hardware"], f"torch {KEPT['versions']['torch']}"):
        assert fact in PAGE


def test_every_kind_was_run_as_often() -> None:
    cases = {name: row["cases"] for name, row in KEPT["cases"].items()}
    assert set(cases) == set(KINDS)
    assert set(cases.values()) == {20000}
    assert sum(row["cases"] for row in KEPT["commands"].values()) >= 500
    assert set(KEPT["commands"]) == set(trees.COMMANDS)


def test_a_part_that_was_not_run_again_says_of_which_run_it_is() -> None:
    old = {name: value for name, value in KEPT.items() if name != "earlier"} | {"date": "then"}
    new = {name: old[name] for name in old if name != "cases"} | {"date": "now", "commands": {}}
    kept = record.beside(new, old)
    assert (kept["date"], kept["cases"]) == ("now", KEPT["cases"])
    assert kept["earlier"]["cases"]["date"] == "then"
    assert record.beside(new, kept)["earlier"] == kept["earlier"]


def test_a_kind_that_was_not_run_again_says_of_which_run_it_is() -> None:
    rows = {name: {"cases": 1} for name in "abc"}
    facts = {name: 0 for name in ("seed", "hardware", "versions", "seconds")}
    old = {**facts, "date": "then", "cases": rows, "commands": rows}
    one = record.beside({**facts, "date": "now", "cases": {"b": {"cases": 2}}}, old)
    assert one["cases"] == rows | {"b": {"cases": 2}}
    runs = {name: run["date"] for name, run in one["earlier"].items()}
    assert runs == {"cases: a": "then", "cases: c": "then", "commands": "then"}
    two = record.beside({**facts, "date": "later", "cases": {"c": {"cases": 3}}}, one)
    runs = {name: run["date"] for name, run in two["earlier"].items()}
    assert runs == {"cases: a": "then", "cases: b": "now", "commands": "then"}
    all_new = record.beside({**facts, "date": "last", "cases": rows, "commands": rows}, two)
    assert "earlier" not in all_new


def test_nothing_ran_and_nothing_was_written() -> None:
    rows = [row for part in ("cases", "commands") for row in KEPT[part].values()]
    for kind in ("executions", "writes", "hangs", "tracebacks", "silent"):
        assert sum(row[kind] for row in rows) == 0, kind


def test_the_page_counts_what_is_called() -> None:
    calls = called.callables(Path("/outside"))
    assert 80 <= len(calls) <= 99
    assert any(MARK in str(args) for _, _, args in calls)
