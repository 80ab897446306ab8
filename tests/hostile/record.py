"""Counts of a run as a file of benchmarks/results, and as the table of docs/hostile-files.md.

python tests/hostile/record.py benchmarks/results/hostile.json     prints the table
"""

import json
import os
import platform
import re
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

FAULTS = ("executions", "writes", "hangs", "tracebacks", "silent")
TITLES = ("executions", "writes outside", "hangs", "tracebacks", "not one sentence")
PACKAGES = ("torch", "megatron-core", "safetensors", "transformers", "tensorboard", "numpy")


def made(result: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Return what is kept of a run: counts, and where, when and with what they were made."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "seed": result["seed"],
        "hardware": f"{_processor()}, {os.cpu_count()} cores",
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in PACKAGES},
        },
        "seconds": round(seconds),
        **{
            part: {name: _row(row) for name, row in result[part]["counts"].items()}
            for part in ("cases", "commands")
            if part in result
        },
    }


def beside(kept: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """Return a record with what was not run again, and of which run that is.

    `earlier` names those runs: of a part, or of one kind of a part as `PART: KIND`.
    """
    facts = {name: before[name] for name in ("date", "seed", "hardware", "versions", "seconds")}
    known = before.get("earlier", {})
    earlier: dict[str, Any] = {}
    parts: dict[str, Any] = {}
    for part in ("cases", "commands"):
        rows, new = before.get(part, {}), kept.get(part)
        gone = [name for name in rows if name not in (new or {})]
        parts |= (
            {part: {**{name: rows[name] for name in gone}, **(new or {})}} if rows or new else {}
        )
        whole = known.get(part, facts)
        if gone and not new:
            earlier[part] = whole
        names = {f"{part}: {name}": known.get(f"{part}: {name}", whole) for name in gone}
        earlier |= {name: run for name, run in names.items() if new or run != whole}
    return {**kept, **({"earlier": earlier} if earlier else {}), **parts}


def _row(counts: dict[str, int]) -> dict[str, int]:
    return {name: counts.get(name, 0) for name in ("cases", "refused", "a result", *FAULTS)}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.is_file() else None
    return found[1] if found else platform.processor()


def table(record: dict[str, Any]) -> str:
    """Return the counts as a table in Markdown, the totals of the two parts last."""
    heads = ("what", "cases", "refused", "a result", *TITLES)
    lines = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
    for part, title in (("cases", "in one process"), ("commands", "real commands")):
        rows = record.get(part, {})
        for name, row in rows.items():
            lines.append(_line(name if part == "cases" else f"`{name}`", row))
        total = {key: sum(row[key] for row in rows.values()) for key in _row({})}
        lines.append(_line(f"**{title}**", total))
    return "\n".join(lines) + "\n"


def _line(name: str, row: dict[str, int]) -> str:
    return f"| {name} | {' | '.join(f'{row[key]:,}' for key in _row({}))} |"


if __name__ == "__main__":
    print(table(json.loads(Path(sys.argv[1]).read_text())), end="")
