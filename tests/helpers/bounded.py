"""Run command lines one after the other in this process, with 1 GiB beside what imports take.

usage: python bounded.py < JSON; the JSON is a list of lists of words. Prints one object a line:
exit code, seconds of processor time, the last line of stderr.
"""

import contextlib
import io
import json
import resource
import sys
import time
from importlib import import_module
from pathlib import Path

from ep_plugin.cli import main

GIB = 1 << 30


def run(words: list[str]) -> dict[str, object]:
    out, err = io.StringIO(), io.StringIO()
    before = time.process_time()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    seconds = time.process_time() - before
    return {"code": code, "seconds": seconds, "said": (out.getvalue() + err.getvalue())[-4000:]}


if __name__ == "__main__":
    for module in ("audit", "convert", "convert.compare"):
        import_module(f"ep_plugin.commands.{module}")
    import_module("ep_plugin.checkpoint.formats.hf_safetensors")
    lines = json.load(sys.stdin)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + GIB
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for line in lines:
        print(json.dumps(run(line)), flush=True)
