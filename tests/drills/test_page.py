"""The table of docs/reliability.md has every drill, as it was measured."""

import importlib.util
import json
from pathlib import Path
from typing import Any

from fault import DRILLS

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]


def writer() -> Any:
    spec = importlib.util.spec_from_file_location("drills_main", HERE / "__main__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_has_the_rows_of_the_drills_there_are() -> None:
    main = writer()
    results = json.loads(main.RESULTS.read_text())
    page = (ROOT / "docs" / "reliability.md").read_text()
    assert set(results["drills"]) == {drill.name for drill in DRILLS}
    endurance = json.loads(main.ENDURANCE.read_text())
    assert main.written(page, results, endurance) == page, (
        "python tests/drills --write docs/reliability.md"
    )
    assert all(drill.title in page for drill in DRILLS)
    assert results["hardware"]["processor"] in page
    assert results["versions"]["torch"] in page


def test_the_page_has_the_figures_of_two_gpus() -> None:
    results = json.loads((ROOT / "benchmarks" / "results" / "drills_h200.json").read_text())
    page = " ".join((ROOT / "docs" / "reliability.md").read_text().split())
    stop, kill = results["drills"]["stop"], results["drills"]["kill"]
    first, second = stop["said_after_s"]
    assert f"after {first} s and again after {second} s" in page
    assert f"watchdog aborts after {stop['watchdog_after_s']} s" in page
    combine = results["drills"]["stop_in_combine"]
    named = [combine["said_after_s"][watch][0] for watch in ("default", "--ep-watch-ranks 10")]
    assert f"names it {named[0]} s later, with `--ep-watch-ranks 10` {named[1]} s later" in page
    assert f"still there {combine['still_there_after_watchdog_s']} s after" in page
    said, ended = kill["said_after_s"][0], kill["ended_after_s"]
    assert f"the sentence comes after {said} s and torchrun ends the job after {ended} s" in page
    assert f"torch {results['versions']['torch']}" in page


def test_the_long_runs_were_whole_and_left_nothing() -> None:
    results = json.loads(writer().ENDURANCE.read_text())
    cycles, steady = results["cycles"], results["steady"]
    assert (cycles["starts"], steady["iterations"]) == (20, 2000)
    assert cycles["left"] == steady["left"] == []
    assert max(steady["files"], steady["threads"]) <= 0


def test_every_drill_was_named_lost_nothing_and_left_nothing() -> None:
    for name, row in json.loads(writer().RESULTS.read_text())["drills"].items():
        assert (row["exact"], row["left"]) == (True, 0), name
        assert row["said"], name
