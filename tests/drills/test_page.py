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
    assert main.written(page, results) == page, "python tests/drills --write docs/reliability.md"
    assert all(drill.title in page for drill in DRILLS)
    assert results["hardware"]["processor"] in page
    assert results["versions"]["torch"] in page


def test_every_drill_was_named_lost_nothing_and_left_nothing() -> None:
    for name, row in json.loads(writer().RESULTS.read_text())["drills"].items():
        assert (row["exact"], row["left"]) == (True, 0), name
        assert row["said"], name
