"""Hugging Face folders: `config.json` and safetensors, in one file or in shards with an index.

    config.json                          the model's settings; `model_type` names its family
    model.safetensors                    all tensors, or
    model-00001-of-00003.safetensors     some of them each, and
    model.safetensors.index.json         {"weight_map": {tensor: file}, "metadata": {"total_size"}}

A safetensors file is eight bytes, the length of its header; the header, JSON that gives each
tensor's dtype, shape and place; and the tensors' bytes. Reading maps the file into memory through
the `safetensors` package. Writing begins with the header, since all shapes are known before a
tensor is, and then needs no more memory than the tensor it is writing.
"""

import json
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ep_plugin.checkpoint.formats._beside import copy_beside as copy_beside
from ep_plugin.checkpoint.formats._beside import files_beside as files_beside
from ep_plugin.checkpoint.formats._beside import left_beside as left_beside
from ep_plugin.checkpoint.formats._header import DTYPES, read_header
from ep_plugin.checkpoint.tensors import NewTensor, Source, TensorInfo, whole
from ep_plugin.checkpoint.writer import HashedFile, Journal, OnBytes, Unit, write_units
from ep_plugin.errors import ConfigError
from ep_plugin.untrusted import cut, read_json, shown

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_SHARD_BYTES = 5 * 10**9  # what `save_pretrained` takes
_AGAIN = "copy the model again"
_MAX_INDEX_BYTES = 32 << 20  # 100 bytes a tensor
_FILE_NAME = re.compile(r"[^/\\\0]{1,240}\.safetensors")
_WORDS = {dtype: word for word, dtype in DTYPES.items()}


def open_folder(folder: Path) -> Source:
    """Open a model; its config.json is under "config" in `common`. Reads no tensor.

    Raises ConfigError when a file is missing, truncated or contradicts the index.
    """
    config = read_json(folder / CONFIG, _AGAIN, by_hand=True)
    files = _files(folder)
    handles: dict[str, Any] = {}
    tensors: dict[str, TensorInfo] = {}
    place: dict[str, str] = {}  # tensor -> file
    for file, listed in files.items():
        header = read_header(folder / file)
        handles[file] = _open(folder / file)
        present = set(header)
        if listed is not None and listed != present:
            raise ConfigError(_contradiction(folder / file, listed, present))
        tensors |= {name: header[name] for name in sorted(header)}
        place |= dict.fromkeys(header, file)

    def read_tensor(name: str) -> Tensor:
        tensor: Tensor = handles[place[name]].get_tensor(name)
        return tensor

    def read_object(name: str) -> bytes:
        raise KeyError(name)

    return Source(
        folder=folder,
        common={"config": config},
        common_in_file=False,
        tensors=tensors,
        objects=frozenset(),
        read_tensor=read_tensor,
        read_object=read_object,
    )


def write_folder(
    folder: Path,
    config: dict[str, Any],
    content: Sequence[NewTensor],
    on_bytes: OnBytes,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    journal: Journal | None = None,
    processes: int = 1,
) -> dict[str, dict[str, Any]]:
    """Write a model into the existing `folder`; `on_bytes` is called with each tensor's bytes.

    What `journal` has is not written again. Returns {num_bytes, sha256} of the files with tensors.
    Raises ConfigError for a dtype that such a folder has no word for.
    """
    for tensor in content:
        if tensor.info.dtype not in _WORDS:
            raise ConfigError(
                f"{cut(tensor.name)} is {tensor.info.dtype}, which is not written as safetensors; "
                "give a checkpoint of bfloat16 or float32 weights"
            )
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    shards = _shards(content, max_shard_bytes)
    names = [f"model-{n + 1:05d}-of-{len(shards):05d}.safetensors" for n in range(len(shards))]
    if len(shards) == 1:
        names = [SINGLE]
    units = [
        Unit(name, sum(tensor.info.num_bytes for tensor in shard), partial(_write_shard, shard))
        for name, shard in zip(names, shards, strict=True)
    ]
    records = write_units(units, folder, journal or Journal(), processes, on_bytes)
    if len(shards) > 1:
        pairs = zip(names, shards, strict=True)
        weight_map = {tensor.name: name for name, shard in pairs for tensor in shard}
        total = sum(unit.num_bytes for unit in units)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return {
        name: {key: record[key] for key in ("num_bytes", "sha256")}
        for name, record in zip(names, records, strict=True)
    }


def _shards(content: Sequence[NewTensor], max_bytes: int) -> list[list[NewTensor]]:
    shards: list[list[NewTensor]] = [[]]
    size = 0
    for tensor in content:
        if shards[-1] and size + tensor.info.num_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.info.num_bytes
    return shards


def _write_shard(shard: list[NewTensor], stream: HashedFile, on_bytes: OnBytes) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in shard:
        begin, end = end, end + tensor.info.num_bytes
        header[tensor.name] = {
            "dtype": _WORDS[tensor.info.dtype],
            "shape": list(tensor.info.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8, as the format asks
    stream.write(len(text).to_bytes(8, "little"))
    stream.write(text)
    for tensor in shard:
        values = whole(tensor).contiguous()
        stream.write(memoryview(values.view(-1).view(torch.uint8).numpy()))
        on_bytes(values.nbytes)


def _files(folder: Path) -> dict[str, set[str] | None]:
    """Return each file and the tensors that the index places in it; None without an index."""
    has_index, is_single = (folder / INDEX).is_file(), (folder / SINGLE).is_file()
    if not has_index:
        if is_single:
            return {SINGLE: None}
        raise ConfigError(
            f"{folder} has a {CONFIG} but neither {SINGLE} nor {INDEX}; give a folder that "
            "save_pretrained wrote with safetensors"
        )
    weight_map = read_json(folder / INDEX, _AGAIN, max_bytes=_MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConfigError(f"{folder / INDEX} has no weight_map; {_AGAIN}")
    files: dict[str, set[str] | None] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _FILE_NAME.fullmatch(file):
            raise ConfigError(
                f"{folder / INDEX} places {cut(name)} in {shown(file)}, which is no safetensors "
                f"file of this folder; {_AGAIN}"
            )
        names = files.setdefault(file, set())
        assert names is not None
        names.add(name)
    if is_single and SINGLE not in files:
        raise ConfigError(
            f"{folder} has {SINGLE} and {INDEX}, which places nothing in it: these are two saves, "
            "and programs differ in which they load; remove one of them"
        )
    missing = [file for file in files if not (folder / file).exists()]
    if missing:
        listed = cut(", ".join(missing), 2000)
        raise ConfigError(f"{folder} lacks {listed}, which {INDEX} names; {_AGAIN}")
    return files


def _contradiction(path: Path, listed: set[str], present: set[str]) -> str:
    parts = []
    if present - listed:
        parts.append(f"{INDEX} has no entry for {_some(present - listed)}, in {path.name}")
    if listed - present:
        parts.append(f"{path.name} lacks {_some(listed - present)}, which {INDEX} places in it")
    return f"{path.parent}: {' and '.join(parts)}; {_AGAIN}"


def _some(names: set[str]) -> str:
    return cut(", ".join(cut(name) for name in sorted(names)), 2000)


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path} is truncated or damaged ({error}); {_AGAIN}") from error
