"""The ranks of `ep-plugin generate`: where they meet, that all have one job, Megatron's groups."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from ep_plugin.errors import ConfigError
from ep_plugin.megatron.cpu import mode as cpu_mode
from ep_plugin.megatron.seams.install import install, uninstall

ORDER = "ep-tp-cp-dp-pp"  # neighbours hold other experts; their slices lie ep ranks apart


@dataclass(frozen=True)
class Layout:
    """The degrees of parallelism, and whether the ranks of the experts count ep fastest."""

    tp: int = 1
    ep: int = 1
    etp: int = 1

    @property
    def order(self) -> str:
        return ORDER if self.etp > 1 else "tp-cp-ep-dp-pp"


@contextmanager
def at_layout(layout: Layout, job: dict[str, Any]) -> Iterator[None]:
    """Provide our block and Megatron's groups; then take them down.

    The job's `store` is a file that all ranks meet at; None: as torchrun says. Raises ConfigError
    where ranks were given different jobs.
    """
    store = job["store"]
    on_cpu = cpu_mode.wanted()
    try:
        if on_cpu:
            cpu_mode.enable()
        else:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        install()
        dist.init_process_group(
            "gloo" if on_cpu else "nccl",
            init_method="env://" if store is None else f"file://{store}",
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
        )
        _check_alike(job, torch.device("cpu" if on_cpu else "cuda"))
        with groups(layout):
            yield
        dist.barrier()
        dist.destroy_process_group()
    finally:
        uninstall()
        cpu_mode.disable()


def _check_alike(job: dict[str, Any], device: torch.device) -> None:
    """Raise ConfigError on all ranks unless all have the first one's job, paths apart."""
    common = {
        name: job[name] for name in job if name not in ("folder", "called", "store", "tokenizer")
    }
    digest = hashlib.sha256(json.dumps(common, sort_keys=True).encode()).digest()
    own = torch.tensor(list(digest), dtype=torch.int64, device=device)  # [32]
    every = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(every, own)
    other = [rank for rank, found in enumerate(every) if not torch.equal(found, every[0])]
    if other:
        raise ConfigError(
            f"rank {other[0]} was started with other prompts, tokens of them or options than rank "
            "0; start all ranks with one command line, and with the same files"
        )


@contextmanager
def groups(layout: Layout) -> Iterator[None]:
    """Make Megatron's groups over the ranks that are there, and take them down."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        order=layout.order,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
