"""The table of faults in docs/reliability.md.

python tests/drills --measure benchmarks/results/drills_cpu.json         run every drill
python tests/drills --endure benchmarks/results/drills_endurance_cpu.json    many starts and steps
python tests/drills --write docs/reliability.md                     its table, from these files
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "drills_cpu.json"
ENDURANCE = RESULTS.with_name("drills_endurance_cpu.json")
BEGIN, END = "<!-- {}: begin -->\n", "<!-- {}: end -->\n"
HEAD = "| fault | what happens | ended or went on after | lost | test |\n|---|---|---|---|---|\n"


def measure() -> dict[str, Any]:
    """Run every drill and return what came of each, with hardware, versions and date."""
    from fault import DRILLS, LAST, SAVES, said, train

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
    return machine() | {"drills": rows}


def endure(folder: Path) -> dict[str, Any]:
    """Run what takes minutes, and return what came of it."""
    from endurance import steady, twenty_cycles

    rows = {"steady": asdict(steady(folder / "steady")), "cycles": asdict(twenty_cycles(folder))}
    return machine() | rows


def machine() -> dict[str, Any]:
    from record import processor

    packages = ("ep-plugin", "torch", "megatron-core")
    return {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "hardware": {"processor": processor(), "cores": len(os.sched_getaffinity(0))},
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in packages},
        },
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


def many(results: dict[str, Any]) -> str:
    """Return what came of many starts and of many steps."""
    cycles, steady = results["cycles"], results["steady"]
    return (
        f"- {cycles['starts']} starts, each from what the one before saved, on 1 to 4 ranks at EP "
        f"1, 2 and 4, {cycles['iterations']} iterations: no loss is further than "
        f"{cycles['apart']:.1e} (relative) from that of a run that never stopped; "
        f"{cycles['seconds']:.0f} s.\n"
        f"- {steady['iterations']} iterations on two ranks with {steady['saves']} saves: from "
        f"iteration {steady['skipped']} on, memory grows by {steady['mib']:.2f} MiB per 1,000 "
        f"iterations, open files by {steady['files']} and threads by {steady['threads']}; "
        f"{steady['seconds']:.0f} s.\n"
    )


def written(page: str, results: dict[str, Any], endurance: dict[str, Any]) -> str:
    """Return a page with the table and the long runs between their marks."""
    for name, text in (("drills", table(results)), ("endurance", many(endurance))):
        begin, end = BEGIN.format(name), END.format(name)
        before, _, rest = page.partition(begin)
        _, _, after = rest.partition(end)
        page = f"{before}{begin}{text}{end}{after}"
    return page


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ways = parser.add_mutually_exclusive_group(required=True)
    ways.add_argument("--measure", type=Path, metavar="FILE")
    ways.add_argument("--write", type=Path, metavar="PAGE")
    ways.add_argument("--endure", type=Path, metavar="FILE")
    args = parser.parse_args()
    if args.endure is not None:
        with tempfile.TemporaryDirectory() as folder:
            args.endure.write_text(json.dumps(endure(Path(folder)), indent=2) + "\n")
    elif args.measure is not None:
        args.measure.write_text(json.dumps(measure(), indent=2) + "\n")
    else:
        results, endurance = (json.loads(file.read_text()) for file in (RESULTS, ENDURANCE))
        args.write.write_text(written(args.write.read_text(), results, endurance))


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers"), str(ROOT / "benchmarks")]
    main()
