"""Keep a quickstart's figures with the machine they were measured on.

    python benchmarks/record.py runs/quickstart quickstart_cpu

writes benchmarks/results/quickstart_cpu.json.
"""

import datetime
import json
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ep_plugin.commands.bench.figures import versions

PACKAGES = ("numpy", "sentencepiece")  # beside those of every file of figures


def processor() -> str:
    """Return the processor's name, as far as the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def record(run: Path) -> dict[str, Any]:
    """Return the summary and the steps' usage of `run`, with hardware, versions and date."""
    usage = sorted((run / "logs").glob("*.usage.json"))
    return {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "hardware": {"processor": processor(), "cores": len(os.sched_getaffinity(0))},
        "versions": versions() | {name: version(name) for name in PACKAGES},
        "summary": json.loads((run / "summary.json").read_text()),
        "steps": {p.name.removesuffix(".usage.json"): json.loads(p.read_text()) for p in usage},
    }


if __name__ == "__main__":
    target = Path(__file__).parent / "results" / f"{sys.argv[2]}.json"
    target.write_text(json.dumps(record(Path(sys.argv[1])), indent=2) + "\n")
    print(f"wrote {target}")
