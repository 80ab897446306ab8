"""Tensors inside a file, mapped instead of read: only the part that is used costs memory and time.

`torch.save` writes a zip archive whose records are stored as they are, so a tensor's values are a
range of the file. `torch.load(mmap=True)` needs an archive with a file of its own; in a
`torch.distributed.checkpoint` many archives lie in one file.
"""

import mmap
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_STORAGES = {  # as torch.save names them; dtypes without one are saved untyped
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}
_LOCAL_HEADER = struct.Struct("<26x2H")  # of a zip record: lengths of its name and extra field


class _Map(mmap.mmap):
    def seekable(self) -> bool:
        """Answer what zipfile asks; the base class has no answer before Python 3.13."""
        return True


def map_tensor(path: Path, offset: int, length: int) -> Tensor:
    """Return the tensor saved in `length` bytes at `offset` of `path`; changes stay in memory.

    Its values may lie at odd addresses: copy them before computing. Raises what zipfile and pickle
    raise for damaged bytes.
    """
    start = offset - offset % mmap.ALLOCATIONGRANULARITY
    with path.open("rb") as stream:
        area = _Map(stream.fileno(), offset + length - start, offset=start, access=mmap.ACCESS_COPY)
    with zipfile.ZipFile(area) as archive:  # type: ignore[call-overload]
        records = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        with archive.open(records["data.pkl"]) as stream:
            tensor: Tensor = _Unpickler(stream, area, records).load()
    return tensor


class _Unpickler(pickle.Unpickler):
    """Builds tensors over `area`; no other name of a pickle is looked at."""

    def __init__(self, stream: Any, area: _Map, records: dict[str, zipfile.ZipInfo]) -> None:
        super().__init__(stream)
        self._area, self._records = area, records

    def find_class(self, module: str, name: str) -> Any:
        known = {
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
            ("torch._utils", "_rebuild_tensor_v3"): _rebuild_as,
            ("torch._utils", "_rebuild_parameter"): lambda values, *_: values,
            ("collections", "OrderedDict"): OrderedDict,
        }
        if (module, name) in known:
            return known[module, name]
        if module in ("torch", "torch.storage"):
            value = _STORAGES.get(name) or getattr(torch, name, None)
            if isinstance(value, torch.dtype):
                return value
        raise pickle.UnpicklingError(f"{module}.{name} is no part of a tensor")

    def persistent_load(self, pid: Any) -> Tensor:
        _, dtype, key, _, count = pid
        record = self._records[f"data/{key}"]
        size = count * dtype.itemsize
        if record.compress_type != zipfile.ZIP_STORED or record.file_size < size:
            raise pickle.UnpicklingError(f"record {key} holds {record.file_size} of {size} bytes")
        names = _LOCAL_HEADER.unpack_from(self._area, record.header_offset)
        start = record.header_offset + 30 + sum(names)
        if count == 0:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(self._area, dtype=dtype, count=count, offset=start)


def _rebuild(storage: Tensor, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    return storage.as_strided(size, stride, offset)


def _rebuild_as(storage: Tensor, offset: int, size: Any, stride: Any, *rest: Any) -> Tensor:
    return storage.view(rest[2]).as_strided(size, stride, offset)
