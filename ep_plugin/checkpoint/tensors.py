"""What travels between a format and the conversion: names, shapes, and one tensor at a time.

A format (`formats/`) lists a checkpoint's tensors and objects under per-layer names, reads any one
of them, and writes regions of new ones. The conversion (`adapt/`) decides what the new ones
are. Neither holds more than the tensor it is working on.
"""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ep_plugin.errors import ConfigError

_AT_ONCE = 1 << 22  # elements looked at together


class Damaged(ConfigError):
    """A checkpoint lacks bytes that it should hold, or they cannot be read."""


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's global shape and dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Source:
    """An opened checkpoint. Names have their layer in them (`decoder.layers.3.mlp...`)."""

    folder: Path  # of the iteration, named iter_NNNNNNN or release
    common: dict[str, Any]  # run arguments under "args", iteration, content_metadata, ...
    common_in_file: bool  # True: kept as common.pt, as older releases do
    tensors: dict[str, TensorInfo]
    objects: frozenset[str]
    read_tensor: Callable[[str], Tensor]
    read_object: Callable[[str], bytes]
    unread: tuple[str, ...] = ()  # states of layers that hold something, and do not go along


@dataclass(frozen=True)
class Chunk:
    """A part of a stored tensor that one rank saved: where it begins and how large it is."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Range:
    """Where a tensor's chunk or an object lies."""

    name: str  # for a message
    file: str
    begin: int
    end: int


@dataclass(frozen=True)
class Stored:
    """A checkpoint as its files have it, with nothing checked, under the names it is stored by."""

    folder: Path  # of the iteration
    common: dict[str, Any]
    tensors: dict[str, TensorInfo]
    chunks: dict[str, tuple[Chunk, ...]]  # of each tensor
    objects: frozenset[str]
    read_chunk: Callable[[str, Chunk], Tensor]  # raises Damaged
    ranges: tuple[Range, ...]  # where chunks and objects lie
    read_object: Callable[[str], Any]  # what `torch.save` wrote, nothing run; raises Damaged
    # Of what was read so far, the tensors and objects whose bytes were saved without checksums.
    unsummed: Callable[[], frozenset[str]] = frozenset


@dataclass(frozen=True)
class Region:
    """Part of a new tensor: where it begins and its values."""

    offsets: tuple[int, ...]
    values: Tensor


@dataclass(frozen=True)
class NewTensor:
    """A tensor to write; `regions` computes it piece by piece, when it is written."""

    name: str
    info: TensorInfo
    regions: Callable[[], Iterator[Region]]


def one_region(info: TensorInfo, compute: Callable[[], Tensor]) -> Iterator[Region]:
    """Yield a whole new tensor as one region; it is computed now."""
    yield Region((0,) * len(info.shape), compute().to(info.dtype))


def whole(tensor: NewTensor) -> Tensor:
    """Compute a new tensor from its regions; where there is only one, without a copy."""
    regions = tensor.regions()
    first = next(regions)
    if tuple(first.values.shape) == tensor.info.shape:
        return first.values
    out = torch.empty(tensor.info.shape, dtype=tensor.info.dtype)
    for region in (first, *regions):
        pairs = zip(region.offsets, region.values.shape, strict=True)
        out[tuple(slice(begin, begin + size) for begin, size in pairs)] = region.values
    return out


@dataclass(frozen=True)
class NewObject:
    """Bytes to write as they are."""

    name: str
    content: bytes


def _no_extra_state() -> bytes:
    buffer = io.BytesIO()
    torch.save([None], buffer)
    return buffer.getvalue()


NO_EXTRA_STATE = _no_extra_state()  # what Megatron saves for a layer without quantisation state


def finite(source: Source) -> Source:
    """Return `source` such that reading a tensor with NaN or infinite values is a ConfigError."""

    def read(name: str) -> Tensor:
        values = source.read_tensor(name)
        if values.is_floating_point() and values.dtype.itemsize > 1:
            parts = torch.split(values.reshape(-1), _AT_ONCE)
            broken = sum(part.numel() - int(part.isfinite().sum()) for part in parts)
            if broken:
                raise ConfigError(
                    f"{name} in {source.folder} has {broken} values that are NaN or infinite; "
                    "give a checkpoint from before they appeared"
                )
        return values

    return replace(source, read_tensor=read)
