"""Whether dispatcher `symm_mem` works here: tried before `auto` takes it, the same on all ranks.

Its buffers need GPUs that map each other's memory. Whether they can is known for certain only when
they have done it, and half a group must not go one way and half another. So every rank allocates
what the run will need, stores a row in every other rank's buffer, and reads what came.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist

from ep_plugin.errors import ConfigError
from ep_plugin.moe.dispatcher._link import Link, Sends
from ep_plugin.moe.dispatcher._shared_buffer import SharedBuffer, shared_buffer
from ep_plugin.moe.groups import ExpertGroups

MOST = 0.1  # of a GPU's memory, for buffers
_WIDTH = 16


class Trial(NamedTuple):
    """What was found for the ranks of `group`."""

    group: dist.ProcessGroup | None
    num_bytes: int
    reason: str | None  # why it does not work


def why_not(groups: ExpertGroups, device: torch.device, num_bytes: int) -> str | None:
    """Return why `symm_mem` does not work with buffers of `num_bytes` a rank; None where it does.

    Every rank of `groups.tp_dp_cp`, or of `groups.ep_etp` where that is None, must call it, and all
    are told the same. It is tried once for all layers that are given `groups`, and again for more
    bytes.
    """
    found: Trial | None = groups.shared.get("trial")
    if found is None or found.group is not groups.ep_etp or found.num_bytes < num_bytes:
        reason = None
        for step in (_missing, _no_memory, _not_reached):  # none begins before all passed the last
            reason = reason or _agreed(groups, step(groups, device, num_bytes))
        if reason is not None:
            groups.shared.pop("buffer", None)
        found = groups.shared["trial"] = Trial(groups.ep_etp, num_bytes, reason)
    return found.reason


def _missing(groups: ExpertGroups, device: torch.device, num_bytes: int) -> str | None:
    """Return what this rank knows without asking another's memory."""
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
    try:  # here, where no other rank waits for this one
        torch.empty(num_bytes, dtype=torch.uint8, device=device)
    except RuntimeError as error:
        return _first_line(error)
    return None


def _no_memory(groups: ExpertGroups, device: torch.device, num_bytes: int) -> str | None:
    """Return why this rank could not have the buffers."""
    try:
        shared_buffer(groups).reserve(num_bytes, device)
    except RuntimeError as error:  # of CUDA, or of the rendezvous
        return _first_line(error)
    return None


def _not_reached(groups: ExpertGroups, device: torch.device, num_bytes: int) -> str | None:
    """Return what went wrong when this rank stored in the others' buffers, and they in its."""
    try:
        came = _exchange_ranks(shared_buffer(groups), device)
    except Exception as error:  # Triton has its own
        return _first_line(error)
    expected = list(range(dist.get_world_size(groups.ep_etp)))
    return None if came == expected else f"from ranks {expected} came {came}"


def _exchange_ranks(buffer: SharedBuffer, device: torch.device) -> list[int]:
    """Send every rank a row that says this one's number; return the numbers that came."""
    ranks = buffer.ranks
    place = torch.full((1, ranks), buffer.rank, dtype=torch.int32, device=device)
    row = torch.full((1, _WIDTH), float(buffer.rank), device=device)
    (came,) = Link(buffer, programs=1).push((row,), Sends(place, ranks, ranks, None))
    buffer.barrier()
    return [int(number) for number in came[:, 0].tolist()]


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _agreed(groups: ExpertGroups, reason: str | None) -> str | None:
    """Return the first reason that any rank has."""
    group = groups.ep_etp if groups.tp_dp_cp is None else groups.tp_dp_cp
    reasons: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(reasons, reason, group=group)
    return next((each for each in reasons if each is not None), None)
