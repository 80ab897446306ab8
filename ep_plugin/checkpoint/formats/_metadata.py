"""`.metadata` of a `torch.distributed.checkpoint` folder: what it says of tensors and files.

Only the tensors' shapes and where their bytes lie are taken, each value checked, and made anew as
torch's own records. What planners of a save left beside them is not looked at. Fields that newer
torch releases added are taken where they are.
"""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from ep_plugin.checkpoint.formats._listed import DTYPES, is_size, sizes
from ep_plugin.checkpoint.inert import Made, Name, Unreadable
from ep_plugin.untrusted import cut

MAX_LAYERS = 16384  # of a stack, and experts of one; loops go over them
MAX_NAME = 1024  # characters of a tensor's name
MAX_FILE_NAME = 255
_STACKED, _EXPERTS = re.compile(r"\blayers\.(?!\d)"), re.compile(r"\.experts\.experts\.(?!\d)")
_DCP = "torch.distributed.checkpoint"
_METADATA = f"{_DCP}.metadata"
_SHARDED = "torch.distributed._shard.sharded_tensor.metadata"
_PROPERTIES = ((_METADATA, "TensorProperties"), (_SHARDED, "TensorProperties"))
# Megatron before 0.16 saved its own; nothing is made of them but what torch's have.
_MEGATRON = "megatron.core.dist_checkpointing.strategies.torch"
# Everything that torch and Megatron name in a `.metadata`; whoever loads one has all of it made.
NAMES = frozenset(
    {
        *((_METADATA, name) for name in (
            *("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata"),
            *("BytesStorageMetadata", "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING"),
        )),
        *((f"{_DCP}.planner", name) for name in (
            *("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"),
        )),
        *_PROPERTIES,
        (_SHARDED, "MEM_FORMAT_ENCODING"),
        (_MEGATRON, "MCoreMetadata"),
        (_MEGATRON, "MCoreSavePlan"),
        (f"{_DCP}.filesystem", "_StorageInfo"),
        (f"{_DCP}.filesystem", "_StoragePrefix"),
        *(("torch", name) for name in (*DTYPES, "Size", "device", "strided")),
        ("torch.serialization", "_get_layout"),
        ("collections", "OrderedDict"),
        ("pathlib", "PosixPath"),
        ("pathlib._local", "PosixPath"),
    }
)  # fmt: skip


def to_metadata(value: Any) -> Metadata:
    """Return torch's record of what a pickle holds; raises Unreadable."""
    state = _state(value, (_METADATA, "Metadata"), (_MEGATRON, "MCoreMetadata"))
    entries, stored = _field(state, "state_dict_metadata", dict), state.get("storage_data")
    if type(stored) is not dict:
        raise Unreadable("it does not say where anything is stored")
    dtypes: dict[int, torch.dtype] = {}
    shapes: dict[int, torch.Size] = {}
    shape = partial(_once, shapes, _shape)
    return Metadata(
        state_dict_metadata={
            _tensor_name(name): _entry(name, entry, dtypes, shape)
            for name, entry in entries.items()
        },
        storage_data={_index(key, shape): _info(info) for key, info in stored.items()},
        version=_version(state),
    )


def _version(state: dict[str, Any]) -> Any:
    version = state.get("version")
    return version if type(version) is str and len(version) < 32 else None


def _once(known: dict[int, Any], make: Callable[[Any], Any], value: Any) -> Any:
    """Return what `make` makes of a value, which many share."""
    found = known.get(id(value))
    if found is None:
        found = known[id(value)] = make(value)
    return found


def _state(value: Any, *kinds: tuple[str, str]) -> dict[str, Any]:
    """Return the fields of an object of one of these classes."""
    if type(value) is not Made or value.kind.key not in kinds:
        said = str(value.kind) if type(value) is Made else f"a {type(value).__name__}"
        raise Unreadable(f"it holds {said} where a {kinds[0][1]} belongs")
    if value.called or value.arguments or value.items is not None:
        raise Unreadable(f"a {kinds[0][1]} in it is made in a way that none is")
    state: dict[str, Any] = value.state if value.state is not None else {}
    if type(state) is not dict:
        raise Unreadable(f"a {kinds[0][1]} in it has no fields")
    return state


def _field(state: dict[str, Any], name: str, kind: type) -> Any:
    value = state.get(name)
    if type(value) is not kind:
        raise Unreadable(f"its {name} is none")
    return value


def _tensor_name(name: Any) -> str:
    if type(name) is not str or len(name) > MAX_NAME or not name.isprintable() or not name:
        raise Unreadable(f"a tensor's name in it is none: {_word(name)}")
    return name


def _entry(
    name: str, value: Any, dtypes: dict[int, torch.dtype], shape: Callable[[Any], torch.Size]
) -> TensorStorageMetadata | BytesStorageMetadata:
    if type(value) is Made and value.kind.key == (_METADATA, "BytesStorageMetadata"):
        _state(value, (_METADATA, "BytesStorageMetadata"))
        return BytesStorageMetadata()
    state = _state(value, (_METADATA, "TensorStorageMetadata"))
    dtype = _once(dtypes, _dtype, state.get("properties"))
    size = shape(state.get("size"))
    lead = len(_STACKED.findall(name)) + len(_EXPERTS.findall(name))
    if any(number > MAX_LAYERS for number in size[:lead]):
        raise Unreadable(f"{cut(name, 80)} in it has {max(size[:lead])} layers or experts")
    chunks = [_chunk(chunk, shape) for chunk in _field(state, "chunks", list)]
    if any(len(chunk.sizes) != len(size) for chunk in chunks):
        raise Unreadable("a part of a tensor in it has another number of dimensions")
    return TensorStorageMetadata(TensorProperties(dtype=dtype), size, chunks)


def _dtype(value: Any) -> torch.dtype:
    """Return the dtype of a tensor's properties, whose state is a tuple or a dictionary."""
    if type(value) is not Made or value.kind.key not in _PROPERTIES or value.called:
        raise Unreadable("the properties of a tensor in it are none")
    state = value.state
    if type(state) is tuple and len(state) == 5:
        said, layout = state[:2]
    elif type(state) is dict:
        said, layout = state.get("dtype"), state.get("layout")
    else:
        raise Unreadable("the properties of a tensor in it are none")
    if type(layout) is Made and layout.arguments != ("torch.strided",):
        raise Unreadable("a tensor in it is sparse; only dense ones are read")
    if type(said) is not Name or said.module != "torch" or said.name not in DTYPES:
        raise Unreadable(f"a tensor's dtype in it is none: {_word(said)}")
    dtype: torch.dtype = DTYPES[said.name]
    return dtype


def _chunk(value: Any, shape: Callable[[Any], torch.Size]) -> ChunkStorageMetadata:
    state = _state(value, (_METADATA, "ChunkStorageMetadata"))
    offsets, extent = shape(state.get("offsets")), shape(state.get("sizes"))
    if len(offsets) != len(extent):
        raise Unreadable("a part of a tensor in it has no place")
    return ChunkStorageMetadata(offsets, extent)


def _shape(value: Any) -> torch.Size:
    if type(value) is not Made or value.kind.key != ("torch", "Size") or len(value.arguments) != 1:
        raise Unreadable("a shape in it is none")
    return torch.Size(sizes(value.arguments[0]))


def _index(value: Any, shape: Callable[[Any], torch.Size]) -> MetadataIndex:
    state = _state(value, (_METADATA, "MetadataIndex"))
    offset, number = state.get("offset"), state.get("index")
    if number is not None and not is_size(number):
        raise Unreadable("the number of a tensor's part in it is none")
    return MetadataIndex(
        _tensor_name(state.get("fqn")), None if offset is None else shape(offset), number
    )


def _info(value: Any) -> _StorageInfo:
    state = _state(value, (f"{_DCP}.filesystem", "_StorageInfo"))
    name, offset, length = state.get("relative_path"), state.get("offset"), state.get("length")
    if not is_size(offset) or not is_size(length):
        raise Unreadable("the place of a tensor in a file in it is none")
    info = _StorageInfo(_file_name(name), offset, length)
    if state.get("transform_descriptors"):
        info.transform_descriptors = ("some",)  # whoever reads the file refuses them
    return info


def _file_name(name: Any) -> str:
    """Return the name of a file beside `.metadata`; no other place is one."""
    fits = type(name) is str and 0 < len(name) <= MAX_FILE_NAME and name.isprintable()
    if not fits or "/" in name or "\\" in name or name in (".", ".."):
        raise Unreadable(f"it names the file {_word(name)}, which is none beside it")
    found: str = name
    return found


def _word(value: Any) -> str:
    """Return a text or a name for a message; of anything else its kind."""
    if type(value) is Name:
        return repr(value)
    return cut(value) if type(value) is str else f"a {type(value).__name__}"
