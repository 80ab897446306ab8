"""The header of a safetensors file: read in bounds, and held against the file."""

from pathlib import Path
from typing import Any

import torch

from ep_plugin.checkpoint.tensors import TensorInfo
from ep_plugin.errors import ConfigError
from ep_plugin.untrusted import check_regular, cut, parse_json, reason, shown

_AGAIN = "copy the model again"
_MAX_HEADER_BYTES = 64 << 20
_MAX_DIMENSIONS = 8
DTYPES = {
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


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Return what the header of a safetensors file says of its tensors; reads no tensor.

    Raises ConfigError unless every byte behind the header belongs to exactly one tensor, whose
    shape and dtype take as many.
    """
    try:
        size = check_regular(path, _AGAIN).st_size
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise ConfigError(
                    f"{path} is truncated or damaged (a header of {length} bytes in a file of "
                    f"{size}); {_AGAIN}"
                )
            text = stream.read(length).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read ({reason(error)}); {_AGAIN}") from error
    entries = parse_json(text, f"the header of {path}", _AGAIN)
    entries.pop("__metadata__", None)
    found = {name: _entry(name, entry, path) for name, entry in entries.items()}
    end = 0
    for name, (begin, after, _) in sorted(found.items(), key=lambda item: item[1][:2]):
        if begin != end:
            raise ConfigError(
                f"{path} places {cut(name)} at byte {begin}, and what is before it ends at {end}; "
                f"{_AGAIN}"
            )
        end = after
    if 8 + length + end != size:
        raise ConfigError(
            f"{path} is truncated or damaged: it has {size} bytes, and its header is of "
            f"{8 + length + end}; {_AGAIN}"
        )
    return {name: info for name, (_, _, info) in found.items()}


def _entry(name: str, entry: Any, path: Path) -> tuple[int, int, TensorInfo]:
    """Return where a tensor begins and ends, and what it is; raises ConfigError."""
    about = f"the header of {path} says of {cut(name)} {shown(entry)}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ConfigError(f"{about}, not dtype, shape and data_offsets alone; {_AGAIN}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or any(type(n) is not int or n < 0 for n in numbers):
            raise ConfigError(f"{about}, where whole numbers are needed; {_AGAIN}")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        raise ConfigError(
            f"{cut(name)} has dtype {shown(entry['dtype'])}; give the model in {', '.join(DTYPES)}"
        )
    info = TensorInfo(tuple(shape), DTYPES[entry["dtype"]])
    if len(shape) > _MAX_DIMENSIONS or len(offsets) != 2 or 0 in shape:
        raise ConfigError(f"{about}, which is no weight; {_AGAIN}")
    if offsets[1] - offsets[0] != info.num_bytes:
        raise ConfigError(f"{about}, and that takes {info.num_bytes} bytes; {_AGAIN}")
    return offsets[0], offsets[1], info
