"""`.metadata` by which a model is no longer the one that is stored: nobody may call it fine.

Each edit says whether the model is still whole: where it is not, a command that ends well is a
fault. Values of any kind are `metadata.edited`'s; how a command ends on these is not foretold.
"""

import copy
import pickle
import random
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as dcp

from ep_plugin.untrusted import cut
from tests.hostile import metadata, pickles, texts

DTYPES = sorted(
    (one for one in vars(torch).values() if isinstance(one, torch.dtype) and one.itemsize), key=str
)


def edited(rng: random.Random, outside: Path, benign: bytes) -> tuple[str, bytes, bool]:
    """Return (kind, bytes of `.metadata`, whether the model is still whole or that is unknown)."""
    if rng.random() < 0.2:
        return *metadata.edited(rng, outside, benign), True
    found, kinds, what = pickle.loads(benign), [], []
    for _ in range(rng.choice((1, 1, 1, 1, 2, 3))):
        kinds.append(rng.choice(sorted(HARMLESS if rng.random() < 0.2 else SPOIL)))
        try:
            words = {**HARMLESS, **SPOIL}[kinds[-1]](rng, found)
        except (IndexError, ValueError):  # nothing of that kind is left by the edits before
            continue
        what.append(f"{kinds[-1]} {cut(words or '')}")
    whole = len(kinds) > 1 or kinds[0] in HARMLESS  # two edits may undo one another
    return f"model: {', '.join(what)}", pickle.dumps(found), whole


def _tensors(found: Any, axes: int = 0) -> list[str]:
    """Return the names of parameters with so many axes or more."""
    entries = found.state_dict_metadata.items()
    return [k for k, e in entries if hasattr(e, "chunks") and len(e.size) >= axes and e.chunks]


def _places(found: Any, name: str) -> list[Any]:
    return [index for index in found.storage_data if index.fqn == name]


def _drop(rng: random.Random, found: Any) -> str:
    name = rng.choice(_tensors(found))
    del found.state_dict_metadata[name]
    for index in _places(found, name):
        del found.storage_data[index]
    return name


def _rename(rng: random.Random, found: Any) -> str:
    old = rng.choice(_tensors(found))
    new = rng.choice((f"{old}x", f"{old}.{pickles.MARK}", old.replace("decoder", "encoder") + "_",
                      old[1:], old.upper(), f"module.{old}", f"{old}/shard_0_1"))  # fmt: skip
    found.state_dict_metadata[new] = found.state_dict_metadata.pop(old)
    for index in _places(found, old):
        found.storage_data[replace(index, fqn=new)] = found.storage_data.pop(index)
    return f"{old} to {new}"


def _dtype(rng: random.Random, found: Any) -> str:
    name = rng.choice(_tensors(found))
    entry = found.state_dict_metadata[name]
    now = entry.properties.dtype
    entry.properties = copy.copy(entry.properties)
    entry.properties.dtype = rng.choice([one for one in DTYPES if one != now])
    return f"{name} as {entry.properties.dtype}"


def _resize(rng: random.Random, found: Any) -> str:
    """Another shape of as many elements, more, fewer or none, told of all parts alike."""
    name = rng.choice(_tensors(found, axes=1))
    entry = found.state_dict_metadata[name]
    size = list(entry.size)
    axis = rng.randrange(len(size))
    shapes: list[list[int]] = [[*size, 1], [1, *size], [prod(size)], size[::-1], []]
    for number in (0, 1, size[axis] - 1, size[axis] + 1, 2 * size[axis]):
        shapes.append([*size[:axis], number, *size[axis + 1 :]])
    shape = torch.Size(rng.choice([one for one in shapes if one != size]))
    entry.size = shape
    start = torch.Size([0] * len(shape))
    entry.chunks = [dcp.ChunkStorageMetadata(start, shape)]
    places = [found.storage_data.pop(index) for index in _places(found, name)]
    found.storage_data[dcp.MetadataIndex(name, start)] = rng.choice(places)
    return f"{name} to {list(shape)}"


def _exchange(rng: random.Random, found: Any) -> None:
    """Let two parameters of different shapes have one another's bytes."""
    one, other = rng.sample(_tensors(found), 2)
    entries = found.state_dict_metadata
    while sorted(entries[one].chunks[0].sizes) == sorted(entries[other].chunks[0].sizes):
        one, other = rng.sample(_tensors(found), 2)
    a, b = _places(found, one)[0], _places(found, other)[0]
    data = found.storage_data
    data[a], data[b] = data[b], data[a]


def _shift(rng: random.Random, found: Any) -> None:
    index = rng.choice(_places(found, rng.choice(_tensors(found))))
    stored = found.storage_data[index]
    by = rng.choice((-64, -1, 1, 7, 64, 4096, stored.length))
    change = rng.choice(({"offset": max(0, stored.offset + by)}, {"length": stored.length + by}))
    if change in ({"offset": stored.offset}, {"length": stored.length}):
        change = {"offset": stored.offset + 1}
    found.storage_data[index] = replace(stored, **change)


def _object(rng: random.Random, found: Any) -> None:
    found.state_dict_metadata[rng.choice(_tensors(found))] = dcp.BytesStorageMetadata()


def _tensor(rng: random.Random, found: Any) -> None:
    """An object becomes a tensor, or there is a tensor that no file has."""
    entries = found.state_dict_metadata
    objects = [name for name, entry in entries.items() if not hasattr(entry, "chunks")]
    entry = copy.deepcopy(entries[rng.choice(_tensors(found))])
    entries[rng.choice((*objects, f"decoder.layers.{rng.randrange(9)}.x.weight"))] = entry


def _parts(rng: random.Random, found: Any) -> None:
    """A part of a parameter is missing, there twice, or elsewhere."""
    entry = found.state_dict_metadata[rng.choice(_tensors(found, axes=1))]
    chunk = rng.choice(entry.chunks)
    sizes, offsets = list(chunk.sizes), list(chunk.offsets)
    axis = rng.randrange(len(sizes))
    moved = [*offsets[:axis], offsets[axis] + 1, *offsets[axis + 1 :]]
    smaller = [*sizes[:axis], sizes[axis] - 1, *sizes[axis + 1 :]]
    entry.chunks = rng.choice((
        [one for one in entry.chunks if one is not chunk],
        [*entry.chunks, chunk],
        [*entry.chunks, replace(chunk, sizes=torch.Size([1] * len(sizes)))],
        [replace(one, offsets=torch.Size(moved)) if one is chunk else one for one in entry.chunks],
        [replace(one, sizes=torch.Size(smaller)) if one is chunk else one for one in entry.chunks],
    ))  # fmt: skip


def _nowhere(rng: random.Random, found: Any) -> None:
    del found.storage_data[rng.choice(_places(found, rng.choice(_tensors(found))))]


def _file(rng: random.Random, found: Any) -> None:
    index = rng.choice(_places(found, rng.choice(_tensors(found))))
    name = rng.choice(("__9_0.distcp", ".metadata", "metadata.json", "__0_0.distcp/x", "..", ""))
    found.storage_data[index] = replace(found.storage_data[index], relative_path=name)


def _other_planner(rng: random.Random, found: Any) -> None:
    found.planner_data = rng.choice((None, {}, {pickles.MARK: (pickles.MARK,)}))


def _order(rng: random.Random, found: Any) -> None:
    for name in ("state_dict_metadata", "storage_data"):
        items = list(getattr(found, name).items())
        rng.shuffle(items)
        setattr(found, name, dict(items))


def _more(rng: random.Random, found: Any) -> None:
    found.version = rng.choice(("1.0.0", None, "9"))
    setattr(found, pickles.MARK, rng.choice(texts.HTML))


SPOIL: dict[str, Any] = {
    "dropped": _drop, "renamed": _rename, "dtype": _dtype, "resized": _resize,
    "exchanged": _exchange, "shifted": _shift, "an object": _object, "a tensor": _tensor,
    "parts": _parts, "nowhere": _nowhere, "file": _file,
}  # fmt: skip
HARMLESS: dict[str, Any] = {"planner": _other_planner, "order": _order, "more": _more}
