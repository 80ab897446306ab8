"""Whether dispatcher `symm_mem` works here: a trial before `auto` takes it.

Its buffers need GPUs that can map each other's memory. Only a trial shows this for certain, and all
ranks must come to the same answer. So every rank allocates what the run will need, stores a row in
every other rank's buffer, and reads the rows it received. After each of these steps the ranks share
what they found: where one fails, no other goes on to a step that would wait for it.
"""

from importlib import import_module
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import _SymmetricMemory

from ep_plugin.errors import ConfigError
from ep_plugin.moe.dispatcher._shared_buffer import shared_buffer
from ep_plugin.moe.groups import ExpertGroups
from ep_plugin.moe.kernels.peers_torch import rows_of

MOST = 0.1  # largest part of a GPU's memory that the buffers may take
_WIDTH = 16  # of the row that is sent


class Trial(NamedTuple):
    """The result of the trial for the ranks of `group`."""

    group: dist.ProcessGroup | None
    num_bytes: int
    reason: str | None  # why it does not work


def why_not(groups: ExpertGroups, device: torch.device, num_bytes: int) -> str | None:
    """Return why `symm_mem` does not work with `num_bytes` of buffer per rank; None if it does.

    Every rank of `groups.tp_dp_cp` must call it, or of `groups.ep_etp` if that is None; all get the
    same answer. There is one trial for all layers with these `groups`, and another if a layer needs
    more bytes.
    """
    found: Trial | None = groups.shared.get("trial")
    if found is None or found.group is not groups.ep_etp or found.num_bytes < num_bytes:
        reason = None
        # Each after all ranks passed the one before.
        for step in (_missing, _no_memory, _not_stored, _not_received):
            reason = reason or _agreed(groups, step(groups, device, num_bytes))
        if reason is not None:
            groups.shared.pop("buffer", None)
        found = groups.shared["trial"] = Trial(groups.ep_etp, num_bytes, reason)
    return found.reason


def _missing(groups: ExpertGroups, device: torch.device, num_bytes: int) -> str | None:
    """Return what is missing, as far as this rank sees it without other ranks' memory."""
    try:
        shared_buffer(groups)
    except ConfigError as error:  # several hosts
        return str(error).partition(";")[0]
    if device.type != "cuda":
        return None
    total = torch.cuda.get_device_properties(device).total_memory
    if num_bytes > MOST * total:
        return (
            f"its buffers take {num_bytes / 2**30:.1f} GiB, more than {MOST:.0%} of the GPU's "
            f"{total / 2**30:.0f}"
        )
    try:  # as `reserve` does, where other ranks would wait for this one; it is freed at once
        _SymmetricMemory.empty_strided_p2p((num_bytes,), (1,), torch.uint8, device)
    except RuntimeError as error:
        return _first_line(error)
    return None


def _no_memory(groups: ExpertGroups, device: torch.device, num_bytes: int) -> str | None:
    """Return why this rank could not allocate the buffers."""
    try:
        shared_buffer(groups).reserve(num_bytes, device)
    except RuntimeError as error:  # from CUDA, or from the rendezvous
        return _first_line(error)
    return None


def _not_stored(groups: ExpertGroups, device: torch.device, num_bytes: int) -> str | None:
    """Return what went wrong when this rank stored its number in every rank's buffer."""
    buffer = shared_buffer(groups)
    place = torch.full((1, buffer.ranks), buffer.rank, dtype=torch.int32, device=device)
    row = torch.full((1, _WIDTH), float(buffer.rank), device=device)
    try:
        kernels = "peers" if row.is_cuda else "peers_torch"
        ops = import_module(f"ep_plugin.moe.kernels.{kernels}")
        ops.push_rows(row, buffer.reserve(0, device), 0, place, 1)
        if row.is_cuda:
            torch.cuda.synchronize(device)
    except Exception as error:  # Triton raises errors of its own types
        return _first_line(error)
    return None


def _not_received(groups: ExpertGroups, device: torch.device, num_bytes: int) -> str | None:
    """Return which numbers came where not one did from every rank."""
    buffer = shared_buffer(groups)
    try:
        buffer.barrier()
        own = buffer.reserve(0, device).buffers[buffer.rank]
        rows = rows_of(own, 0, buffer.ranks, torch.empty(0, _WIDTH, device=device))
        came = [int(number) for number in rows[:, 0].tolist()]
    except Exception as error:
        return _first_line(error)
    expected = list(range(buffer.ranks))
    return None if came == expected else f"from ranks {expected} came {came}"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _agreed(groups: ExpertGroups, reason: str | None) -> str | None:
    """Return the first reason that any rank has."""
    group = groups.ep_etp if groups.tp_dp_cp is None else groups.tp_dp_cp
    reasons: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(reasons, reason, group=group)
    return next((each for each in reasons if each is not None), None)
