"""The table of faults in docs/reliability.md.

python tests/drills --measure benchmarks/results/drills_cpu.json    run every drill
python tests/drills --write docs/reliability.md                     its table, from that file
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "drills_cpu.json"
BEGIN, END = "<!-- drills: begin -->\n", "<!-- drills: end -->\n"
HEAD = "| fault | what happens | ended or went on after | lost | test |\n|---|---|---|---|---|\n"


def measure() -> dict[str, Any]:
    """Run every drill and return what came of each, with hardware, versions and date."""
    from fault import DRILLS, LAST, SAVES, said, train
    from record import processor

    packages = ("ep-plugin", "torch", "megatron-core")
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        whole = train(Path(folder, "whole"))
        for drill in DRILLS:
            ended = train(Path(folder, drill.name), drill.fault, *drill.flags)
            resumed = ended
            if not drill.goes_on:
                resumed = train(Path(folder, f"{drill.name}.resumed"), load=ended.saved)
            same = resumed.losses == whole.losses[LAST - len(resumed.losses) :]
            rows[drill.name] = {
                "said": (said(drill, ended) or "").replace(folder, "FOLDER"),
                "exit": ended.code,
                "seconds": round(ended.seconds, 1),
                "again": 0 if drill.goes_on else drill.fault.iteration - 1 - SAVES,
                "exact": same and bool(resumed.losses),
                "left": len(ended.left),
            }
    return {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "hardware": {"processor": processor(), "cores": len(os.sched_getaffinity(0))},
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in packages},
        },
        "drills": rows,
    }


def table(results: dict[str, Any]) -> str:
    """Return the table's rows, one for each drill."""
    from fault import DRILLS

    lines = [HEAD]
    for drill in DRILLS:
        row = results["drills"][drill.name]
        what = drill.comes if row["exit"] else f"{drill.comes}; the run goes on"
        lost = "nothing" if row["exact"] else "SOMETHING"
        if row["again"]:
            lost += f"; {row['again']} iteration{'s' if row['again'] > 1 else ''} run again"
        test = f"`test_it_is_named_and_nothing_is_lost[{drill.name}]`"
        lines.append(f"| {drill.title} | {what} | {row['seconds']} s | {lost} | {test} |\n")
    return "".join(lines)


def written(page: str, results: dict[str, Any]) -> str:
    """Return a page with the table between its marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{table(results)}{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ways = parser.add_mutually_exclusive_group(required=True)
    ways.add_argument("--measure", type=Path, metavar="FILE")
    ways.add_argument("--write", type=Path, metavar="PAGE")
    args = parser.parse_args()
    if args.measure is not None:
        args.measure.write_text(json.dumps(measure(), indent=2) + "\n")
    else:
        results = json.loads(RESULTS.read_text())
        args.write.write_text(written(args.write.read_text(), results))


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers"), str(ROOT / "benchmarks")]
    main()
