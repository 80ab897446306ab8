"""Run a command and write what it used: python _measure.py USAGE.json COMMAND ARGS ...

Peak memory is the largest sum over the command and its descendants, sampled twice a second, of each
process's resident memory; a page that several processes share counts in equal parts (PSS).
"""

import json
import subprocess
import sys
import time
from pathlib import Path


def resident_bytes(root: int) -> int:
    """Return the summed resident memory of process `root` and its descendants; 0 without /proc."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # the process ended while we looked
        children.setdefault(parent, []).append(int(folder.name))
    total, queue = 0, [root]
    while queue:
        process = queue.pop()
        total += proportional_set_bytes(process)
        queue += children.get(process, [])
    return total


def proportional_set_bytes(process: int) -> int:
    """Return the process's PSS; 0 when it has ended."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def main(usage: Path, command: list[str]) -> int:
    """Run `command`; return its exit code. The file is written when it succeeds."""
    started, peak = time.monotonic(), 0
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            peak = max(peak, resident_bytes(process.pid))
            time.sleep(0.5)
    if process.returncode == 0:
        seconds = time.monotonic() - started
        usage.write_text(json.dumps({"seconds": round(seconds, 1), "peak_rss_bytes": peak}) + "\n")
    return process.returncode


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
