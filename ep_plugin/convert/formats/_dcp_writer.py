"""Write a `torch.distributed.checkpoint` folder region by region, as one rank.

torch's own FileSystemWriter keeps every tensor of a file alive until the file is closed; here a
region is forgotten as soon as it is on disk.
"""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import torch
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from ep_plugin.convert.stream import NewObject, NewTensor, Region

MAX_FILE_BYTES = 4 << 30  # a new file is begun after this many


class Writer:
    """Use as `with Writer(folder, on_bytes) as writer: writer.add(...)`.

    Leaving the block without an error writes `.metadata`, and only then is the folder a checkpoint.
    """

    def __init__(self, folder: Path, on_bytes: Callable[[int], object]) -> None:
        self._folder, self._on_bytes = folder, on_bytes
        self._num_files = 0
        self._entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        self._stored: dict[MetadataIndex, _StorageInfo] = {}
        self._open_next()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._close()
        if kind is None:
            self._write_metadata()

    def add(self, entry: NewTensor | NewObject) -> None:
        """Append one tensor or object."""
        if isinstance(entry, NewObject):
            self._entries[entry.name] = BytesStorageMetadata()
            self._append(MetadataIndex(entry.name), entry.content())
            return
        chunks: list[ChunkStorageMetadata] = []
        for region in entry.regions():
            chunk = ChunkStorageMetadata(torch.Size(region.offsets), region.values.shape)
            self._append(MetadataIndex(entry.name, chunk.offsets, len(chunks)), region)
            chunks.append(chunk)
        self._entries[entry.name] = TensorStorageMetadata(
            properties=TensorProperties(dtype=entry.info.dtype),
            size=torch.Size(entry.info.shape),
            chunks=chunks,
        )

    def _append(self, index: MetadataIndex, content: Region | bytes) -> None:
        if self._stream.tell() >= MAX_FILE_BYTES:
            self._close()
            self._open_next()
        offset = self._stream.tell()
        if isinstance(content, bytes):
            self._stream.write(content)
        else:
            torch.save(content.values, self._stream)
            self._on_bytes(content.values.nbytes)
        length = self._stream.tell() - offset
        self._stored[index] = _StorageInfo(self._path.name, offset, length)

    def _open_next(self) -> None:
        self._path = self._folder / f"__0_{self._num_files}.distcp"
        self._stream = self._path.open("wb")
        self._num_files += 1

    def _close(self) -> None:
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()

    def _write_metadata(self) -> None:
        metadata = Metadata(
            state_dict_metadata=self._entries,
            storage_data=self._stored,
            version=CURRENT_DCP_VERSION,
        )
        with (self._folder / ".metadata").open("wb") as stream:
            pickle.dump(metadata, stream)
