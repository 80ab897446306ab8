"""Tensors inside a file, mapped instead of read: only the part that is used costs memory and time.

`torch.save` writes an archive whose records are stored as they are, so a tensor's values are a
range of the file. In a `torch.distributed.checkpoint` many archives lie in one file.
"""

import mmap
import zlib
from pathlib import Path
from typing import Any

from torch import Tensor

from ep_plugin.checkpoint.formats._archive import open_archive
from ep_plugin.checkpoint.formats._pickle import read_pickle
from ep_plugin.checkpoint.formats._values import Values
from ep_plugin.checkpoint.inert import Unreadable
from ep_plugin.untrusted import cut

_MAX_TENSOR = 1 << 16  # bytes of a pickle of one tensor
_MAX_STATE = 1 << 30  # of a rank's whole state


def check_sums(path: Path, offset: int, length: int) -> None:
    """Raise Unreadable unless every record of an archive has the bytes that it was written with.

    An archive that was written without checksums is not looked at.
    """
    size = path.stat().st_size
    if length == 0 or offset + length > size:
        raise Unreadable(f"it has {max(size - offset, 0)} of {length} bytes")
    start = offset - offset % mmap.ALLOCATIONGRANULARITY
    with path.open("rb") as stream:
        area = mmap.mmap(
            stream.fileno(), offset + length - start, offset=start, access=mmap.ACCESS_READ
        )
    with area, memoryview(area) as view:
        for name, record in open_archive(area, offset - start).records.items():
            with view[record.start : record.start + record.size] as content:
                if record.crc and zlib.crc32(content) != record.crc:
                    raise Unreadable(f"its record {cut(name)} has other bytes than were written")


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


def map_state(path: Path) -> Any:
    """Return what a file of `torch.save` holds, its tensors mapped; raises Unreadable."""
    if path.stat().st_size == 0:
        raise Unreadable("it is empty")
    with path.open("rb") as stream:
        area = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
    archive = open_archive(area)
    return Values(archive).build(read_pickle(archive.pickle(_MAX_STATE)))
