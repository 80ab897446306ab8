"""The store in which ranks compare: the one that torch would make, or has made."""

import os
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store
from torch.distributed.rendezvous import rendezvous


def given_or_environment(given: Mapping[str, Any], name: str) -> int | None:
    """Return `rank` or `world_size` as it was given, or as the environment has it."""
    found = given.get(name, -1)
    if found >= 0:
        return int(found)
    said = os.environ.get(name.upper())
    return int(said) if said else None


def rendezvous_store(init_method: str | None, rank: int, size: int, timeout: timedelta) -> Any:
    """Return the store that `init_process_group` would make.

    Rank 0 does not wait in it for the others: it would wait for one that never comes.
    """
    if init_method not in (None, "env://") or "MASTER_PORT" not in os.environ:
        url = init_method or "env://"
        store, *_ = next(rendezvous(url, rank, size, timeout=timeout))
    else:
        store = store_of_environment(rank, size, timeout)
    store.set_timeout(timeout)
    return store


def store_of_environment(rank: int, size: int, timeout: timedelta) -> Any:
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    make = dist.TCPStore  # type: ignore[attr-defined]
    return make(
        *(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), size),
        is_master=rank == 0 and not agent,
        timeout=timeout,
        wait_for_workers=False,
        multi_tenant=not agent,
        use_libuv=os.environ.get("USE_LIBUV", "1") == "1",
    )


def store_of_group() -> Any:
    """Return the default group's store; None where its backend has none."""
    if dist.get_backend() in ("mpi", "fake"):
        return None
    return _get_default_store()


def seconds_since_start() -> float:
    """Return the seconds since this process began."""
    with suppress(OSError, ValueError, IndexError):
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return 0.0
