"""Read a `torch.distributed.checkpoint` folder one tensor at a time, whatever ranks wrote it."""

import mmap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from ep_plugin.checkpoint.formats._iteration import MAX_OBJECT, inside, load_object
from ep_plugin.checkpoint.formats._mapped import check_sums, map_tensor
from ep_plugin.checkpoint.inert import Unreadable, explained
from ep_plugin.checkpoint.tensors import Chunk, Damaged, Range, TensorInfo
from ep_plugin.checkpoint.whole import (
    SHARD,
    STACKED,
    misnamed,
    misplaced,
    other_kind,
    overlapping,
)
from ep_plugin.errors import ConfigError
from ep_plugin.untrusted import cut

_SUMMED, _UNSUMMED = 1, 2
_AGAIN = "copy the checkpoint again"


@dataclass(frozen=True)
class _Place:
    """Where a per-layer tensor lies: the stored key and, where layers are stacked, which one."""

    key: str
    layer: int | None


class Files:
    """The chunks and objects of one folder by their stored names; nothing is checked."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        self.folder, self.metadata = folder, metadata
        self.entries = _tensor_entries(self.metadata)
        places = ((s.relative_path, s.offset) for s in metadata.storage_data.values())
        self._number = {place: number for number, place in enumerate(dict.fromkeys(places))}
        # Of each, whether it was read, and has checksums; shared with forked workers.
        self._sound = mmap.mmap(-1, max(len(self._number), 1))

    def read_bytes(self, index: MetadataIndex) -> bytes:
        """Return an object's bytes; raises Damaged when no file has them."""
        path, stored = self._find(index)
        if stored.offset + stored.length > path.stat().st_size:
            raise Damaged(f"{path} is cut off before the end of {index.fqn}; {_AGAIN}")
        if stored.length > MAX_OBJECT:
            raise Damaged(
                f"object {cut(index.fqn)} in {self.folder} has {stored.length} bytes, and none of "
                f"more than {MAX_OBJECT} is read; give another checkpoint"
            )
        try:
            self._check(path, stored)
        except (Unreadable, OSError, MemoryError) as error:
            raise Damaged(f"object {index.fqn} in {self.folder} {explained(error)}") from error
        with path.open("rb") as stream:
            stream.seek(stored.offset)
            return stream.read(stored.length)

    def read_object(self, name: str) -> Any:
        """Return what an object holds, nothing run; raises Damaged."""
        try:
            return load_object(self.read_bytes(MetadataIndex(name)))
        except (Unreadable, MemoryError) as error:
            raise Damaged(f"object {name} in {self.folder} {explained(error)}") from error

    def ranges(self) -> tuple[Range, ...]:
        """Return where every chunk and object lies."""
        return tuple(
            Range(
                index.fqn + (f" at {list(index.offset)}" if index.offset else ""),
                stored.relative_path,
                stored.offset,
                stored.offset + stored.length,
            )
            for index, stored in self.metadata.storage_data.items()
        )

    def _check(self, path: Path, stored: _StorageInfo) -> None:
        """Raise Unreadable where the bytes of an archive are not those that were written."""
        number = self._number[stored.relative_path, stored.offset]
        if not self._sound[number]:
            has_sums = check_sums(path, stored.offset, stored.length)
            self._sound[number] = _SUMMED if has_sums else _UNSUMMED

    def unsummed(self) -> frozenset[str]:
        """Return the names of what was read so far and has no checksums."""
        stored = self.metadata.storage_data.items()
        numbers = ((index.fqn, self._number[s.relative_path, s.offset]) for index, s in stored)
        return frozenset(name for name, number in numbers if self._sound[number] == _UNSUMMED)

    def read_chunk(self, key: str, chunk: Chunk) -> Tensor:
        """Return a chunk's values, mapped: what is not looked at is not read.

        Raises Damaged when they cannot be read.
        """
        path, stored = self._find(MetadataIndex(key, torch.Size(chunk.offsets)))
        try:
            self._check(path, stored)
            values = map_tensor(path, stored.offset, stored.length)
            if tuple(values.shape) != chunk.sizes:
                raise Unreadable(f"it has shape {list(values.shape)}, not {list(chunk.sizes)}")
            return values
        except (Unreadable, OSError, MemoryError) as error:
            raise Damaged(
                f"tensor {key} at {chunk.offsets} in {self.folder} {explained(error)}"
            ) from error

    def _find(self, index: MetadataIndex) -> tuple[Path, _StorageInfo]:
        stored: _StorageInfo | None = self.metadata.storage_data.get(index)
        if stored is None:
            raise Damaged(f"{self.folder} says of no file that {index.fqn} is in it; {_AGAIN}")
        path = self.folder / stored.relative_path
        if not path.is_file():
            raise Damaged(
                f"{self.folder} lacks {stored.relative_path}, where {index.fqn} is; {_AGAIN}"
            )
        return inside(path, self.folder), stored

    def chunks(self, key: str) -> tuple[Chunk, ...]:
        """Return the parts of a tensor, in the order they are listed."""
        listed = self.entries[key].chunks
        return tuple(Chunk(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in listed)

    def info(self, key: str) -> TensorInfo:
        """Return a stored tensor's whole shape and dtype."""
        entry = self.entries[key]
        return TensorInfo(tuple(entry.size), entry.properties.dtype)


class Reader:
    """The tensors and objects of one folder, by per-layer name.

    `tensors` gives each tensor's shape and dtype, `objects` each object's stored key. Raises
    ConfigError when a file lacks bytes that `.metadata` places in it.
    """

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        self._files = Files(folder, metadata)
        _check_names(self._files)
        _check_files(folder, metadata)
        self._places = _one_each(folder, _places(self._files.entries))
        self.tensors = {name: self._info(place) for name, place in self._places.items()}
        self.objects = _one_each(folder, _objects(metadata))

    def read_object(self, name: str) -> bytes:
        """Return an object's bytes; raises Damaged when they are of another kind than its name."""
        key = self.objects[name]
        content = self._files.read_bytes(MetadataIndex(key))
        if (wrong := other_kind(key, self._files.read_object(key))) is not None:
            raise Damaged(f"object {key} in {self._files.folder} {wrong}; {_AGAIN}")
        return content

    def read_tensor(self, name: str) -> Tensor:
        """Return one whole tensor on CPU, put together from the chunks that its ranks saved.

        Chunks are mapped, and of a chunk that holds several layers one is looked at.

        Raises ConfigError when a chunk is damaged.
        """
        place = self._places[name]
        out = torch.empty(self.tensors[name].shape, dtype=self.tensors[name].dtype)
        for chunk in self._files.chunks(place.key):
            first, layers = (0, 1) if place.layer is None else (chunk.offsets[0], chunk.sizes[0])
            if not first <= (place.layer or 0) < first + layers:
                continue
            values = self._files.read_chunk(place.key, chunk)
            if values.dtype != out.dtype:
                raise Damaged(
                    f"tensor {place.key} at {chunk.offsets} in {self._files.folder} is "
                    f"{values.dtype}, where .metadata says {out.dtype}; {_AGAIN}"
                )
            offsets = chunk.offsets
            if place.layer is not None:
                values, offsets = values[place.layer - first], offsets[1:]
            region = tuple(slice(o, o + s) for o, s in zip(offsets, values.shape, strict=True))
            out[region] = values
        return out

    def _info(self, place: _Place) -> TensorInfo:
        info = self._files.info(place.key)
        return info if place.layer is None else TensorInfo(info.shape[1:], info.dtype)


def _check_names(files: Files) -> None:
    """Raise ConfigError for an object that is named as a tensor is, or the other way round."""
    shapes = {key: entry.size for key, entry in files.entries.items()}
    for wrong in misnamed(shapes, set(files.metadata.state_dict_metadata) - set(shapes)):
        raise ConfigError(f"{wrong}, in {files.folder}; {_AGAIN}")


def _check_files(folder: Path, metadata: Metadata) -> None:
    """Raise ConfigError unless every tensor is whole and every file long enough for its chunks."""
    for key, entry in _tensor_entries(metadata).items():
        saved = sum(prod(chunk.sizes) for chunk in entry.chunks)
        if saved != prod(entry.size):
            raise ConfigError(
                f"{folder} holds {saved} of the {prod(entry.size)} elements of {key}: "
                "not all ranks' parts are there; give a checkpoint whose save finished"
            )
        _check_fit(folder, key, entry, metadata)
    for name, message in overlapping(Files(folder, metadata).ranges()):
        raise ConfigError(f"{name} in {folder} {message}; {_AGAIN}")
    needed: dict[str, int] = {}
    for stored in metadata.storage_data.values():
        end = stored.offset + stored.length
        needed[stored.relative_path] = max(needed.get(stored.relative_path, 0), end)
        if stored.transform_descriptors:
            raise ConfigError(f"{folder} was saved through stream transforms; save it without them")
    for name, size in needed.items():
        path = folder / name
        if not path.is_file():
            raise ConfigError(f"{folder} lacks {name} ({size} bytes); {_AGAIN}")
        inside(path, folder)
        if path.stat().st_size < size:
            raise ConfigError(
                f"{path} is truncated: it has {path.stat().st_size} bytes, but .metadata "
                f"places {size} in it; {_AGAIN}"
            )


def _check_fit(folder: Path, key: str, entry: TensorStorageMetadata, metadata: Metadata) -> None:
    """Raise ConfigError unless a tensor's chunks have their bytes, and each element is in one."""
    for chunk in entry.chunks:
        stored = metadata.storage_data.get(MetadataIndex(key, chunk.offsets))
        needed = prod(chunk.sizes) * entry.properties.dtype.itemsize
        if stored is not None and needed > stored.length:
            raise ConfigError(
                f"{folder} says that {key} at {list(chunk.offsets)} has {needed} bytes, in "
                f"{stored.length} bytes of {stored.relative_path}; {_AGAIN}"
            )
    chunks = [Chunk(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks]
    for message, places in misplaced(tuple(entry.size), chunks):
        count = sum(places.values())
        raise ConfigError(f"{count} elements of {key} in {folder} {message}; {_AGAIN}")


def _tensor_entries(metadata: Metadata) -> dict[str, TensorStorageMetadata]:
    entries = metadata.state_dict_metadata
    return {k: entry for k, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}


def _places(entries: dict[str, TensorStorageMetadata]) -> Iterator[tuple[str, _Place]]:
    for key, entry in entries.items():
        stacked = STACKED.fullmatch(key)
        if stacked is None:
            yield key, _Place(key, None)
            continue
        for layer in range(entry.size[0]):
            yield f"{stacked[1]}{layer}.{stacked[2]}", _Place(key, layer)


def _objects(metadata: Metadata) -> Iterator[tuple[str, str]]:
    for key, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            continue
        shard = SHARD.fullmatch(key)
        stacked = STACKED.fullmatch(shard[1]) if shard else None
        if shard is None or stacked is None:
            yield key, key
            continue
        offsets, shape = shard[2].split("."), shard[3].split(".")
        rest = f"{'.'.join(offsets[1:]) or 0}_{'.'.join(shape[1:]) or 1}"
        yield f"{stacked[1]}{offsets[0]}.{stacked[2]}/shard_{rest}", key


def _one_each[T](folder: Path, named: Iterable[tuple[str, T]]) -> dict[str, T]:
    """Return what is named; raises ConfigError for a layer's on its own and in a stack as well."""
    found: dict[str, T] = {}
    for name, what in named:
        if name in found:
            raise ConfigError(
                f"{cut(name)} is in {folder} twice, on its own and with that of all layers; "
                f"{_AGAIN}"
            )
        found[name] = what
    return found
