"""Worlds of gloo ranks forked from a process that has imported everything."""

import json
import multiprocessing
import multiprocessing.connection
import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def run_world(world: int, function: Callable[..., Any], *args: Any) -> dict[str, Any]:
    """Call `function` on forked ranks; return what the last one returns, or the first error."""
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("fork")
        ranks = [
            context.Process(target=_rank, args=(rank, world, folder, function, args))
            for rank in range(world)
        ]
        for process in ranks:
            process.start()
        while alive := [process for process in ranks if process.is_alive()]:
            multiprocessing.connection.wait([process.sentinel for process in alive])
            if any(process.exitcode for process in ranks):
                for process in alive:
                    process.terminate()
        errors = [path.read_text() for path in Path(folder).glob("error.*")]
        if errors or any(process.exitcode for process in ranks):
            return {"error": (errors or ["a rank ended without a word"])[0]}
        result: dict[str, Any] = json.loads(Path(folder, "result").read_text())
        return result


def _rank(
    rank: int, world: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), STORE=f"{folder}/store")
    try:
        result = function(*args)
        if rank == world - 1:  # which writes Megatron's log too
            Path(folder, "result").write_text(json.dumps(result or {}))
    except BaseException:
        Path(folder, f"error.{rank}").write_text(traceback.format_exc())
        os._exit(1)


def connect() -> None:
    """Meet the other ranks of this world, unless they have met."""
    if dist.is_initialized():
        return
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.FileStore(os.environ["STORE"], world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)


def one_rank() -> None:
    """Give this process, the only rank of its world, Megatron's groups."""
    from megatron.core import parallel_state, tensor_parallel

    connect()
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
