"""Run every layout and check on every release; keep what was found and write the document's table.

python tests/helpers/support_matrix.py [RELEASE ...]   minutes for each release; by default all
python tests/helpers/support_matrix.py --table         write the document's table anew, run nothing

The results stay in benchmarks/results/support_matrix.json; a release that is run replaces its own.
"""

import datetime
import json
import platform
import sys
from typing import Any

import cpu_only  # noqa: F401  before Megatron
import torch
from core_model import Case
from layouts import CASES, CHECKS, difference, results
from releases import RELEASES, ROOT
from tqdm import tqdm

FILE = ROOT / "benchmarks" / "results" / "support_matrix.json"
DOCUMENT = ROOT / "docs" / "support-matrix.md"
MARKS = ("<!-- support matrix -->\n", "<!-- /support matrix -->")
RELATIVE = 1e-5
ITERATIONS = 10


def measure(version: str) -> dict[str, Any]:
    """Return what is kept of a release."""
    found = results(version, CASES, ITERATIONS)
    return {
        "layouts": {case.name: _layout(found, case) for case in CASES},
        "checks": {name: {"passed": found[name] == {}} for name in CHECKS},
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": f"CPU, gloo, {platform.machine()}",
        "date": datetime.date.today().isoformat(),
    }


def _layout(found: dict[str, Any], case: Case) -> dict[str, Any]:
    if "error" in found[case.name]:
        return {"passed": False, "error": found[case.name]["error"].splitlines()[-1]}
    worst = difference(found, case)
    return {"passed": worst < RELATIVE, "max_rel_diff": worst}


def table(kept: dict[str, Any]) -> str:
    """Return the document's table: a row for each layout and check, a column for each release."""
    lines = [
        "| | " + " | ".join(RELEASES) + " |",
        "|---|" + "---|" * len(RELEASES),
        *(
            f"| {row} | " + " | ".join(_cell(kept[v][kind].get(row)) for v in RELEASES) + " |"
            for kind, rows in (("layouts", [case.name for case in CASES]), ("checks", CHECKS))
            for row in rows
        ),
    ]
    return "\n".join(lines) + "\n"


def _cell(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return "not run"
    if not entry["passed"]:
        return "fails"
    return f"{entry['max_rel_diff']:.0e}" if "max_rel_diff" in entry else "passes"


def main() -> None:
    """Measure, keep, write the table."""
    kept = json.loads(FILE.read_text()) if FILE.exists() else {}
    if "--table" not in sys.argv:
        for version in tqdm(sys.argv[1:] or RELEASES, unit="release"):
            kept[version] = measure(version)
            FILE.write_text(json.dumps(dict(sorted(kept.items())), indent=1) + "\n")
    before, _, rest = DOCUMENT.read_text().partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    DOCUMENT.write_text(before + MARKS[0] + table(kept) + MARKS[1] + after)


if __name__ == "__main__":
    main()
