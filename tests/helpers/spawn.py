"""Run a function on several ranks inside a test.

Gloo ranks are forked from one process that has imported torch, and what `preload` names, already:
importing is most of what a short run costs.
"""

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

_preloaded = ["cpu_only", "torch.distributed", "ep_plugin.moe.layer"]


def preload(*modules: str) -> None:
    """Import these too before ranks are forked; counts until the first are."""
    _preloaded.extend(modules)
    multiprocessing.set_forkserver_preload(_preloaded)


preload()


def run_ranks(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    backend: str = "gloo",
    uses_gpu: bool = False,
) -> list[Any]:
    """Return what `function(*args)` returns on each rank; an exception on a rank fails the test.

    `function` must be a module's own; results and arguments are pickled. With nccl each rank has a
    GPU of its own; with gloo and `uses_gpu` they share one, and are not forked: CUDA forbids it.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(
            _rank_main,
            (world_size, folder, backend, dict(os.environ), function, args),
            nprocs=world_size,
            start_method="spawn" if uses_gpu or backend == "nccl" else "forkserver",
        )
        return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(world_size)]


def _rank_main(
    rank: int,
    world_size: int,
    folder: str,
    backend: str,
    environment: dict[str, str],
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    os.environ.clear()
    os.environ.update(environment)  # a forked rank has that of the process it was forked from
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.FileStore(f"{folder}/store", world_size)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    torch.save(function(*args), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
