"""Starting the ranks of `ep-plugin generate`, unless torchrun has."""

import json
import os
import re
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from signal import Signals
from typing import Any

from ep_plugin.errors import ConfigError

LOADER = "ep_plugin.megatron.workers.load"
WORKER = "ep_plugin.megatron.workers.generate_run"
ERROR = re.compile(r"^ep_plugin(?:\.run)?: error: (.*)$", re.MULTILINE)
UNREAD = 141  # code of a rank whose output nobody reads any more
TAIL = 30  # lines of a failed rank that are shown


class Died(RuntimeError):
    """A rank ended without a sentence of ours."""


class Killed(Exception):
    """A signal ended a rank: nobody's mistake that is known. `code` is what a shell would say."""

    def __init__(self, rank: int, signal: int) -> None:
        named = {each.value: f" ({each.name})" for each in Signals}.get(signal, "")
        super().__init__(
            f"rank {rank} was ended by signal {signal}{named}; where memory ran out, use more "
            "ranks (--ep, --tp) or --dtype bf16"
        )
        self.code = 128 + signal


def ranks_started(wanted: int) -> int | None:
    """Return the number of ranks that a launcher has started; None where this is none of them.

    Raises ConfigError where it is another number than the layout has.
    """
    said = os.environ.get("WORLD_SIZE")
    if "RANK" not in os.environ or said is None:
        return None
    if said != str(wanted):
        raise ConfigError(
            f"WORLD_SIZE is {said}, and --tp, --ep and --etp make {wanted} ranks; start "
            f"{wanted} ranks, or give a layout of {said}"
        )
    return wanted


def start(job: dict[str, Any], world: int, started: int | None, scratch: Path) -> None:
    """Do the job on `world` ranks; raises ConfigError for what a rank refuses.

    One that a launcher has `started` does its part in this process. Raises Killed where a signal
    ended a rank, BrokenPipeError where nobody reads the output, and Died for any other end.
    """
    if started is not None:
        import_module(LOADER).load(WORKER).do(job | {"store": None})
        return
    path = scratch / "job.json"
    path.write_text(json.dumps(job | {"store": str(scratch / "store")}))
    ranks: list[subprocess.Popen[bytes]] = []
    said = [scratch / f"rank{rank}" for rank in range(world)]
    try:
        for rank in range(world):
            command = [sys.executable, "-m", LOADER, WORKER, str(path)]
            with said[rank].open("wb") as file:
                own = _environment(rank, world)
                ranks.append(subprocess.Popen(command, stderr=file, env=own))
        failed = _wait(ranks)
        if failed is not None:
            _raise(failed, ranks, said)
    finally:
        for process in ranks:
            if process.poll() is None:
                process.kill()
            process.wait()


def _environment(rank: int, world: int) -> dict[str, str]:
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    defaults = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    if world > 1:
        defaults |= {"OMP_NUM_THREADS": "1"}
    paths = [path for path in sys.path if path]  # a rank finds this very plugin
    return {
        **defaults,
        **os.environ,
        **{name: str(value) for name, value in own.items()},
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONSAFEPATH": "1",
    }


def _wait(ranks: list[subprocess.Popen[bytes]]) -> int | None:
    """Return the first rank seen to fail, or None once all have ended well."""
    while True:
        codes = [process.poll() for process in ranks]
        failed = [rank for rank, code in enumerate(codes) if code]
        if failed:
            time.sleep(0.2)  # a rank that says why it ends takes others with it
            return failed[0]
        if None not in codes:
            return None
        time.sleep(0.02)


def _raise(failed: int, ranks: list[subprocess.Popen[bytes]], said: list[Path]) -> None:
    """Raise what a rank said: a ConfigError with its sentence where there is one."""
    texts = [file.read_text(errors="replace") for file in said]
    for text in (texts[failed], *texts):
        found = ERROR.search(text)
        if found:
            raise ConfigError(found[1])
    for rank, process in enumerate(ranks):  # a rank that was killed takes others with it
        if (process.poll() or 0) < 0:
            raise Killed(rank, -process.returncode)
    code = ranks[failed].returncode
    if UNREAD in [process.returncode for process in ranks]:
        raise BrokenPipeError
    print("\n".join(texts[failed].splitlines()[-TAIL:]), file=sys.stderr)
    raise Died(f"rank {failed} of {len(ranks)} ended with code {code}; its last lines are above")
