"""`.metadata` and run arguments that are right pickles of the right classes, with other values."""

import argparse
import contextlib
import copy
import io
import pickle
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tests.hostile import pickles, texts

TOKENIZERS = ("SentencePieceTokenizer", "HuggingFaceTokenizer", "TikTokenizer", "GPT2BPETokenizer")
SIZES = (0, -1, 1, 10**9, 1 << 40, 1 << 60, 1 << 62, 3)


def load(folder: Path) -> Any:
    """Return the metadata of a benign folder, made by ourselves."""
    return pickle.loads((folder / ".metadata").read_bytes())


def edited(rng: random.Random, outside: Path, benign: bytes) -> tuple[str, bytes]:
    """Return (kind, bytes) of `.metadata`: sizes, dtypes, files, names or attributes are others."""
    found = pickle.loads(benign)
    for _ in range(rng.choice((1, 1, 2))):
        kind = rng.choice(sorted(EDITS))
        with contextlib.suppress(AttributeError, TypeError, IndexError):  # spoiled already
            EDITS[kind](rng, outside, found)
    return f"metadata: {kind}", pickle.dumps(found)


def _entry(rng: random.Random, found: Any) -> tuple[str, Any]:
    entries = [(k, e) for k, e in found.state_dict_metadata.items() if hasattr(e, "chunks")]
    return rng.choice(entries)


def _size(rng: random.Random, outside: Path, found: Any) -> None:
    _, entry = _entry(rng, found)
    sizes = list(entry.size) or [1]
    sizes[rng.randrange(len(sizes))] = rng.choice(SIZES)
    entry.size = torch.Size(sizes)


def _chunk(rng: random.Random, outside: Path, found: Any) -> None:
    _, entry = _entry(rng, found)
    if not entry.chunks:
        return
    chunk = rng.choice(entry.chunks)
    name = rng.choice(("offsets", "sizes"))
    values = list(getattr(chunk, name)) or [0]
    values[rng.randrange(len(values))] = rng.choice(SIZES)
    setattr(chunk, name, torch.Size(values))


def _chunks(rng: random.Random, outside: Path, found: Any) -> None:
    _, entry = _entry(rng, found)
    entry.chunks = rng.choice(([], entry.chunks * 2, entry.chunks * 1000, entry.chunks[:-1], None))


def _dtype(rng: random.Random, outside: Path, found: Any) -> None:
    _, entry = _entry(rng, found)
    values = (torch.float64, torch.int8, torch.complex64, torch.bool, None, "float32", 5)
    entry.properties.dtype = rng.choice(values)


def _stored(rng: random.Random, outside: Path, found: Any) -> None:
    index = rng.choice(list(found.storage_data))
    change = rng.choice(
        (
            {"relative_path": rng.choice((*texts.paths(outside), 5, None))},
            {"offset": rng.choice((*SIZES, None, "0"))},
            {"length": rng.choice((*SIZES, None))},
            {"transform_descriptors": [pickles.MARK]},
        )
    )
    found.storage_data[index] = replace(found.storage_data[index], **change)


def _swapped(rng: random.Random, outside: Path, found: Any) -> None:
    one, other = rng.choice(list(found.storage_data)), rng.choice(list(found.storage_data))
    data = found.storage_data
    data[one], data[other] = data[other], data[one]


def _name(rng: random.Random, outside: Path, found: Any) -> None:
    names = (*texts.paths(outside), *texts.HTML, 5, None, ("a",), "decoder.layers.999999999.x")
    entries = found.state_dict_metadata
    entries[rng.choice(names)] = entries.pop(rng.choice(list(entries)))


def _attribute(rng: random.Random, outside: Path, found: Any) -> None:
    owners = [found, rng.choice(list(found.state_dict_metadata.values()))]
    owners += [rng.choice(list(found.storage_data.values()))]
    owner = rng.choice(owners)
    names = list(vars(owner))
    if not names:
        return
    name = rng.choice(names)
    if rng.random() < 0.5:
        object.__delattr__(owner, name)
    else:
        object.__setattr__(owner, name, texts.value(rng, outside))


def _kinds(rng: random.Random, outside: Path, found: Any) -> None:
    entries = found.state_dict_metadata
    entries[rng.choice(list(entries))] = rng.choice((None, 1, "x", [], found, {}))


EDITS: dict[str, Any] = {
    "size": _size, "chunk": _chunk, "chunks": _chunks, "dtype": _dtype, "stored": _stored,
    "swapped": _swapped, "name": _name, "attribute": _attribute, "kinds": _kinds,
}  # fmt: skip


def arguments(rng: random.Random, outside: Path, benign: bytes) -> tuple[str, bytes]:
    """Return (kind, bytes) of an archive with run arguments whose values are others."""
    common = torch.load(io.BytesIO(benign), weights_only=False)
    holder = common[0] if isinstance(common, list) else common
    if not isinstance(holder, dict):  # no arguments, but some other object
        return "arguments: other", _saved(_value(rng, outside))
    if "args" not in holder or rng.random() < 0.1:
        holder[rng.choice((*holder, pickles.MARK))] = _value(rng, outside)
        return "arguments: beside", _saved(common)
    args = holder["args"] = copy.copy(holder["args"])
    for _ in range(rng.choice((1, 1, 3))):
        name = rng.choice(
            (*vars(args), "ep_router", "moe_router_load_balancing_type", "num_experts")
        )
        act = rng.random()
        if rng.random() < 0.15 and hasattr(args, "tokenizer_model"):
            args.tokenizer_model = rng.choice((*texts.paths(outside), str(outside)))
            args.tokenizer_type = rng.choice(TOKENIZERS)
        elif act < 0.2 and hasattr(args, name):
            delattr(args, name)
        elif act < 0.3:
            setattr(args, str(rng.choice(texts.paths(outside))), _value(rng, outside))
        elif act < 0.5 and name.startswith("ep_"):
            setattr(args, name, f"{pickles.MODULE}.anything")
        else:
            setattr(args, name, _value(rng, outside))
    return "arguments: edited", _saved(common)


def _value(rng: random.Random, outside: Path) -> Any:
    """Return a value of any type, also of those that JSON has not."""
    if rng.random() < 0.8:
        return texts.value(rng, outside)
    inner = texts.value(rng, outside)
    return rng.choice(
        (torch.ones(2), torch.empty(0), torch.tensor(3), torch.bfloat16, (inner,), {1, 2}, b"\xff",
         argparse.Namespace(x=inner), bytearray(3), 1j, {1: inner}, {(): inner})
    )  # fmt: skip


def _saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()
