"""Gradients of experts that several ranks of one expert-parallel group hold.

Megatron's DDP sums an expert's gradient over the ranks of its expert-data-parallel group. A layer
with fewer experts than the ranks of an expert-parallel group could share has each of them on
several of its ranks (`ExpertGroups.copies`), which saw other tokens. Their gradients are summed
here when DDP has ended its own sum. The scale is right as it is: DDP divides by all data-parallel
ranks.

Copies have the same place in expert data parallelism. So with the distributed optimizer they own
the same part of the same buffer. The rest of the buffer is summed too, and read by nobody.
"""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from ep_plugin.megatron.seams.patches import Patches

FINISH = (
    "megatron.core.distributed.distributed_data_parallel:DistributedDataParallel.finish_grad_sync"
)


def changes(patches: Patches) -> None:
    """Let DDP's last word on gradients include the ranks with copies of an expert."""
    patches.wrap(
        FINISH, _and_over_copies, "DDP has summed the gradients; copies of experts are summed next"
    )


def _and_over_copies(original: Callable[..., None], ddp: Any, *args: Any, **kwargs: Any) -> None:
    original(ddp, *args, **kwargs)
    for parameter in ddp.module.parameters():
        group = getattr(parameter, "copies", None)
        if group is not None and parameter.requires_grad:
            dist.all_reduce(parameter.main_grad, group=group)  # in place: it is a part of a buffer
