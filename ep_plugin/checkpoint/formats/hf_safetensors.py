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
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ep_plugin.checkpoint.tensors import NewTensor, Source, TensorInfo, whole
from ep_plugin.checkpoint.writer import HashedFile, Journal, OnBytes, Unit, write_units
from ep_plugin.errors import ConfigError
from ep_plugin.untrusted import read_json

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_SHARD_BYTES = 5 * 10**9  # what `save_pretrained` takes
_AGAIN = "copy the model again"
_MAX_INDEX_BYTES = 32 << 20  # 100 bytes a tensor
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_WORDS = {dtype: word for word, dtype in _DTYPES.items()}


def open_folder(folder: Path) -> Source:
    """Open a model; its config.json is under "config" in `common`. Reads no tensor.

    Raises ConfigError when a file is missing, truncated or contradicts the index.
    """
    config = read_json(folder / CONFIG, _AGAIN)
    files = _files(folder)
    handles: dict[str, Any] = {}
    tensors: dict[str, TensorInfo] = {}
    for file, listed in files.items():
        handles[file] = handle = _open(folder / file)
        present = set(handle.keys())
        if listed is not None and listed != present:
            raise ConfigError(_contradiction(folder / file, listed, present))
        for name in sorted(present):
            part = handle.get_slice(name)
            tensors[name] = TensorInfo(tuple(part.get_shape()), _dtype(part.get_dtype(), name))
    place = {name: file for file, handle in handles.items() for name in handle.keys()}  # noqa: SIM118

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
    """
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


# Files of tokenizers, by every name that transformers and the models' own code give them.
_BESIDE = (
    *("tokenizer*", "tokenization*.py", "special_tokens*", "added_tokens*", "vocab*", "merges*"),
    *("*.model", "*.tiktoken", "tiktoken*", "tekken*.json", "spm*", "*.spm", "*vocab*.json"),
    *("*.jinja", "chat_template*", "additional_chat_templates/*", "normalizer.json"),
    *("dict.txt", "byte_maps.json", "emoji.json", "word_shape.json", "word_pronunciation.json"),
    *("bpe.codes", "*.tokenizer", "generation_config.json"),
)


def files_beside(folder: Path) -> list[Path]:
    """Return the files of a model's tokenizer and for generation, relative to `folder`."""
    paths = {path for pattern in _BESIDE for path in folder.glob(pattern) if path.is_file()}
    return sorted(path.relative_to(folder) for path in paths if path.suffix not in _WEIGHTS)


_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")


def copy_beside(source: Path, target: Path) -> None:
    """Copy what a model folder holds for its tokenizer and for generation."""
    for path in files_beside(source):
        (target / path).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / path, target / path)


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
    if not (folder / INDEX).is_file():
        if (folder / SINGLE).is_file():
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
        names = files.setdefault(file, set())
        assert names is not None
        names.add(name)
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise ConfigError(f"{folder} lacks {', '.join(missing)}, which {INDEX} names; {_AGAIN}")
    return files


def _contradiction(path: Path, listed: set[str], present: set[str]) -> str:
    parts = []
    if present - listed:
        parts.append(f"{INDEX} has no entry for {_some(present - listed)}, in {path.name}")
    if listed - present:
        parts.append(f"{path.name} lacks {_some(listed - present)}, which {INDEX} places in it")
    return f"{path.parent}: {' and '.join(parts)}; {_AGAIN}"


def _some(names: set[str]) -> str:
    return ", ".join(sorted(names))


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path} is truncated or damaged ({error}); {_AGAIN}") from error


def _dtype(word: str, name: str) -> torch.dtype:
    if word not in _DTYPES:
        raise ConfigError(f"{name} has dtype {word}; give the model in {', '.join(_DTYPES)}")
    return _DTYPES[word]
