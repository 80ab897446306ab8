"""Write one of Megatron's `torch_dist` checkpoints region by region, as one rank.

torch's own FileSystemWriter keeps every tensor of a file alive until the file is closed; here a
region is forgotten as soon as it is on disk.
"""

import json
import pickle
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

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

from ep_plugin.checkpoint.formats._iteration import COMMON_STATE, CONFIG, TRACKER
from ep_plugin.checkpoint.formats._write_pickle import carried_bytes
from ep_plugin.checkpoint.run_args import RunArgs, as_saved
from ep_plugin.checkpoint.tensors import NewObject, NewTensor, Source
from ep_plugin.checkpoint.writer import HashedFile, Journal, OnBytes, Unit, write_units

MAX_FILE_BYTES = 1 << 30  # a new file is begun rather than hold more, unless it is one tensor


def write_checkpoint(
    root: Path,
    source: Source,
    common: dict[str, Any],
    content: Iterable[NewTensor | NewObject],
    on_bytes: OnBytes,
    journal: Journal | None = None,
    processes: int = 1,
) -> dict[str, dict[str, Any]]:
    """Write `content` under `root`, in the same iteration and the same style as `source`.

    `common` replaces the source's; `on_bytes` is called with each region's number of bytes. What
    `journal` has is not written again. Returns {num_bytes, sha256} of the files with tensors.
    """
    folder = root / source.folder.name
    folder.mkdir(parents=True, exist_ok=True)
    common = {**common, "content_metadata": _content_metadata(source.common)}
    if isinstance(common.get("args"), RunArgs):
        common["args"] = as_saved(common["args"])
    entries = list(content)
    if not source.common_in_file:
        entries.append(NewObject(COMMON_STATE, carried_bytes([common])))
    files = units(entries)
    records = write_units(files, folder, journal or Journal(), processes, on_bytes)
    names = [unit.name for unit in files]
    contents = [record["content"] for record in records]
    write_metadata(folder, list(zip(names, contents, strict=True)))
    if source.common_in_file:
        write_common(folder, common)
    else:
        _write_config(folder)
    iteration = source.folder.name.removeprefix("iter_")
    (root / TRACKER).write_text(iteration if iteration == "release" else str(int(iteration)))
    return {
        f"{folder.name}/{name}": {key: record[key] for key in ("num_bytes", "sha256")}
        for name, record in zip(names, records, strict=True)
    }


def write_common(folder: Path, common: dict[str, Any]) -> None:
    """Write run arguments as `common.pt`, and that the folder is a torch_dist checkpoint's."""
    (folder / "common.pt").write_bytes(carried_bytes(common))
    _write_config(folder)


def _write_config(folder: Path) -> None:
    (folder / "metadata.json").write_text(json.dumps(CONFIG))


def _content_metadata(common: dict[str, Any]) -> dict[str, Any]:
    return {**(common.get("content_metadata") or {}), "non_homogeneous_layers": True}


def units(content: Iterable[NewTensor | NewObject]) -> list[Unit]:
    """Return the files that hold `content`, in its order."""
    files: list[list[NewTensor | NewObject]] = [[]]
    sizes = [0]
    for entry in content:
        size = entry.info.num_bytes if isinstance(entry, NewTensor) else 0
        if files[-1] and sizes[-1] + size > MAX_FILE_BYTES:
            files.append([])
            sizes.append(0)
        files[-1].append(entry)
        sizes[-1] += size
    return [
        Unit(f"__0_{number}.distcp", size, partial(_write_file, entries))
        for number, (entries, size) in enumerate(zip(files, sizes, strict=True))
    ]


def write_metadata(folder: Path, written: Sequence[tuple[str, list[Any]]]) -> None:
    """Write `.metadata` for files with what `units` returned of each; then it is a checkpoint."""
    entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    stored: dict[MetadataIndex, _StorageInfo] = {}
    for file, records in written:
        for record in records:
            name, chunks = record["name"], []
            for number, (offsets, sizes, offset, length) in enumerate(record["chunks"]):
                index = MetadataIndex(name)
                if "dtype" in record:
                    chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
                    index = MetadataIndex(name, chunks[-1].offsets, number)
                stored[index] = _StorageInfo(file, offset, length)
            entries[name] = BytesStorageMetadata()
            if "dtype" in record:
                properties = TensorProperties(dtype=getattr(torch, record["dtype"]))
                entries[name] = TensorStorageMetadata(
                    properties, torch.Size(record["shape"]), chunks
                )
    metadata = Metadata(
        state_dict_metadata=entries, storage_data=stored, version=CURRENT_DCP_VERSION
    )
    with (folder / ".metadata").open("wb") as stream:
        pickle.dump(metadata, stream)


def _write_file(
    entries: Sequence[NewTensor | NewObject], stream: HashedFile, on_bytes: OnBytes
) -> list[dict[str, Any]]:
    """Append the entries; returns for each {name, [dtype, shape,] chunks}, as JSON can hold it."""
    return [_write_entry(entry, stream, on_bytes) for entry in entries]


def _write_entry(
    entry: NewTensor | NewObject, stream: HashedFile, on_bytes: OnBytes
) -> dict[str, Any]:
    if isinstance(entry, NewObject):
        start = stream.tell()
        stream.write(entry.content)
        return {"name": entry.name, "chunks": [[[], [], start, stream.tell() - start]]}
    chunks = []
    for region in entry.regions():
        values = region.values
        if values.untyped_storage().nbytes() != values.nbytes:
            values = values.clone()  # else all of what it is a view of would be saved
        start = stream.tell()
        torch.save(values, stream)  # type: ignore[arg-type]  # of a file it only writes
        chunks.append([list(region.offsets), list(values.shape), start, stream.tell() - start])
        on_bytes(values.nbytes)
    dtype = str(entry.info.dtype).removeprefix("torch.")
    return {"name": entry.name, "dtype": dtype, "shape": list(entry.info.shape), "chunks": chunks}
