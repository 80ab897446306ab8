"""Tensors inside a file, mapped instead of read: only the part that is used costs memory and time.

`torch.save` writes an archive whose records are stored as they are, so a tensor's values are a
range of the file. In a `torch.distributed.checkpoint` many archives lie in one file.
"""

import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from ep_plugin.checkpoint.formats._archive import open_archive
from ep_plugin.checkpoint.formats._pickle import read_pickle
from ep_plugin.checkpoint.formats._values import Values
from ep_plugin.checkpoint.inert import Unreadable

_MAX_TENSOR = 1 << 16  # bytes of a pickle of one tensor
_MAX_STATE = 1 << 30  # of a rank's whole state


def check_sums(path: Path, offset: int, length: int) -> bool:
    """Raise Unreadable unless every record of an archive has the bytes that it was written with.

    Whether it has checksums; one that was written without is not looked at.
    """
    size = path.stat().st_size
    if length == 0 or offset + length > size:
        raise Unreadable(f"it has {max(size - offset, 0)} of {length} bytes")
    start = offset - offset % mmap.ALLOCATIONGRANULARITY
    with path.open("rb") as stream:
        area = mmap.mmap(
            stream.fileno(), offset + length - start, offset=start, access=mmap.ACCESS_READ
        )
    with area:
        archive = open_archive(area, offset - start)
        for name in archive.records:
            archive.check(name)
        return archive.has_sums


def map_tensor(path: Path, offset: int, length: int) -> Tensor:
    """Return the tensor saved in `length` bytes at `offset` of `path`; changes stay in memory.

    Its values may lie at odd addresses: copy them before computing. Raises Unreadable.
    """
    size = path.stat().st_size
    if length == 0 or offset + length > size:
        raise Unreadable(f"it has {max(size - offset, 0)} of {length} bytes")
    start = offset - offset % mmap.ALLOCATIONGRANULARITY
    with path.open("rb") as stream:
        area = mmap.mmap(
            stream.fileno(), offset + length - start, offset=start, access=mmap.ACCESS_COPY
        )
    archive = open_archive(area, offset - start)
    tensor = Values(archive).build(read_pickle(archive.pickle(_MAX_TENSOR)))
    if not isinstance(tensor, Tensor):
        raise Unreadable("it holds no tensor")
    return tensor.detach()


def map_state(path: Path) -> tuple[Any, Callable[[Tensor], None]]:
    """Return what a file of `torch.save` holds, its tensors mapped, and a check of one of them.

    The check raises Unreadable for values that are not those that were written; the bytes of a
    storage are looked at once, when it is first asked for. Raises Unreadable.
    """
    if path.stat().st_size == 0:
        raise Unreadable("it is empty")
    with path.open("rb") as stream:
        area = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
    archive = open_archive(area)
    values = Values(archive)
    return values.build(read_pickle(archive.pickle(_MAX_STATE))), values.check
