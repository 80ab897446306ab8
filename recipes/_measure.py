"""Run a command and write what it used: python _measure.py USAGE.json COMMAND ARGS ...

Peak memory is the largest sum, over the command's process group tree, of each process's resident set,
sampled four times a second; shared pages count once per process, so it is an upper bound.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path


def resident_bytes(root: int) -> int:
    """Return the summed resident set of process `root` and all its descendants; 0 without /proc."""
    children: dict[int, list[int]] = {}
    resident: dict[int, int] = {}
    page = os.sysconf("SC_PAGE_SIZE")
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            resident[int(folder.name)] = int(fields[21]) * page
        except OSError:
            continue  # the process ended while we looked
        children.setdefault(int(fields[1]), []).append(int(folder.name))
    total, queue = 0, [root]
    while queue:
        process = queue.pop()
        total += resident.get(process, 0)
        queue += children.get(process, [])
    return total


def main(usage: Path, command: list[str]) -> int:
    """Run `command`; return its exit code. The file is written when it succeeds."""
    started, peak = time.monotonic(), 0
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            peak = max(peak, resident_bytes(process.pid))
            time.sleep(0.25)
    if process.returncode == 0:
        seconds = time.monotonic() - started
        usage.write_text(json.dumps({"seconds": round(seconds, 1), "peak_rss_bytes": peak}) + "\n")
    return process.returncode


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
