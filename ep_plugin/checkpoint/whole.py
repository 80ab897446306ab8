"""Is what lies in the files what `.metadata` says? `audit`, `convert` and `convert --check` ask it.

    overlapping     two tensors or objects lie on each other in a file
    misnamed        an object is named as a tensor is, or the other way round
    misplaced       elements of a tensor are in no chunk, in two, or outside of its shape
    other_kind      an object holds what belongs to one of another kind

Whether bytes are those that were written, their archives' own checksums say (`formats/_mapped.py`).
"""

import argparse
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import Any

import torch

from ep_plugin.checkpoint.tensors import Chunk, Range, Stored
from ep_plugin.errors import ConfigError
from ep_plugin.untrusted import cut

MAX_CELLS = 100_000_000  # of the grid that the chunks of one tensor make
MAX_LEAD = 100_000  # layers or experts along an axis
STACKED = re.compile(r"((?:optimizer\.state\.\w+\.)?decoder\.layers\.)(?!\d)(.+)")
SHARD = re.compile(r"(.+)/shard_([\d.]+)_([\d.]+)")
Place = tuple[int | None, int | None]  # layer, expert


def overlapping(ranges: Iterable[Range]) -> Iterator[tuple[str, str]]:
    """Yield the name of what lies on something else, and a message that names that."""
    before: Range | None = None
    for one in sorted(ranges, key=lambda r: (r.file, r.begin, r.end)):
        if one.begin == one.end:
            yield one.name, f"has no bytes in {one.file}"
            continue
        if before is not None and before.file == one.file and one.begin < before.end:
            yield (
                one.name,
                f"lies at bytes {one.begin} to {one.end} of {one.file}, where {before.name} "
                f"lies ({before.begin} to {before.end})",
            )
        if before is None or before.file != one.file or one.end > before.end:
            before = one


def misplaced(
    shape: tuple[int, ...],
    chunks: Sequence[Chunk],
    lead: int = 0,
    place_of: Callable[[tuple[int, ...]], Place] = lambda _: (None, None),
) -> Iterator[tuple[str, dict[Place, int]]]:
    """Yield what is wrong, and how many elements of which layer and expert it is wrong of.

    Every begin and end of a chunk is a line of a grid; each cell must be in exactly one chunk. The
    first `lead` axes, of layers and experts, have a line at each. Raises ConfigError for a tensor
    in more parts than are looked at.
    """
    chunks = [chunk for chunk in chunks if prod(chunk.sizes) or len(chunk.sizes) != len(shape)]
    inside = [chunk for chunk in chunks if _is_inside(chunk, shape)]
    if len(inside) < len(chunks):
        strange = next(chunk for chunk in chunks if not _is_inside(chunk, shape))
        same = len(strange.offsets) == len(shape)
        place = place_of(strange.offsets) if same else (None, None)
        yield f"lie outside its shape {list(shape)}", {place: prod(strange.sizes)}
    if any(size > MAX_LEAD for size in shape[:lead]):
        raise ConfigError(
            f"a tensor of shape {list(shape)} has more than {MAX_LEAD} layers or experts; "
            "copy the checkpoint again"
        )
    lines = [_lines(axis, axis < lead, shape, inside) for axis in range(len(shape))]
    if prod(len(axis) for axis in lines) > MAX_CELLS:
        raise ConfigError(
            f"a tensor of shape {list(shape)} is in {len(chunks)} parts whose edges are not those "
            "of a grid; save it in another layout"
        )
    index = [{line: number for number, line in enumerate(axis)} for axis in lines]
    times = torch.zeros([max(len(axis) - 1, 0) for axis in lines], dtype=torch.int32)
    for chunk in inside:
        extents = zip(index, chunk.offsets, chunk.sizes, strict=True)
        times[tuple(slice(axis[first], axis[first + n]) for axis, first, n in extents)] += 1
    for message, wrong in (("are in no file", times == 0), ("are there twice", times > 1)):
        places: dict[Place, int] = {}
        for cell in wrong.nonzero().tolist():
            begins = tuple(axis[number] for axis, number in zip(lines, cell, strict=True))
            ends = tuple(axis[number + 1] for axis, number in zip(lines, cell, strict=True))
            size = prod(end - begin for begin, end in zip(begins, ends, strict=True))
            places[place_of(begins)] = places.get(place_of(begins), 0) + size
        if places:
            yield message, places


def misnamed(tensors: Mapping[str, Sequence[int]], objects: Iterable[str]) -> Iterator[str]:
    """Yield what is wrong with names as they are stored; `tensors` has the shape of each.

    Objects have their place in the name, and no tensor has; a stack of layers has an axis of them.
    """
    for name, shape in tensors.items():
        if SHARD.fullmatch(name):
            yield f"{cut(name)} is a tensor, named as an object is"
        elif STACKED.fullmatch(name) and not shape:
            yield f"{cut(name)} is of all layers, and has no axis of them"
    for name in objects:
        if not SHARD.fullmatch(name):
            yield f"{cut(name)} is an object, named as a tensor is"


def other_kind(name: str, value: Any) -> str | None:
    """Return what is wrong with the content of the object `name`: that of one of another kind."""
    first = name.partition("/")[0].rpartition(".")[2]
    wanted = first if first in _SIGNS else None
    found = next((kind for kind, sign in _SIGNS.items() if sign(value)), None)
    if found not in (None, wanted):
        return f"holds what belongs to {found}"
    if wanted is not None and found is None and value == [None]:
        return "holds nothing"
    return None


def _first_dict(value: Any) -> dict[Any, Any]:
    while isinstance(value, list) and len(value) > 0:
        value = value[0]
    return value if isinstance(value, dict) else {}


_SIGNS: dict[str, Callable[[Any], bool]] = {
    "rng_state": lambda value: "random_rng_state" in _first_dict(value),
    "rerun_state_machine_state": lambda value: "rerun_requested" in _first_dict(value),
    "common_state": lambda value: isinstance(_first_dict(value).get("args"), argparse.Namespace),
}


def problems(
    stored: Stored, look: Callable[[str, Any], None] = lambda name, value: None
) -> Iterator[tuple[str, str]]:
    """Yield (name, what is wrong) of where things lie and of the objects; reads no tensor.

    `look` is shown each object.
    """
    yield from overlapping(stored.ranges)
    for name in sorted(stored.objects):
        try:
            value = stored.read_object(name)
            wrong = other_kind(name, value)
            look(name, value)
        except ConfigError as error:
            wrong = f"cannot be read ({error})"
        if wrong is not None:
            yield cut(name), wrong


def _lines(axis: int, each: bool, shape: tuple[int, ...], chunks: list[Chunk]) -> list[int]:
    """Return where cells begin and end on an axis; with `each`, everywhere."""
    if each:
        return list(range(shape[axis] + 1))
    ends = ((c.offsets[axis], c.offsets[axis] + c.sizes[axis]) for c in chunks)
    return sorted({0, shape[axis], *itertools.chain.from_iterable(ends)})


def _is_inside(chunk: Chunk, shape: tuple[int, ...]) -> bool:
    return len(chunk.offsets) == len(shape) == len(chunk.sizes) and all(
        first >= 0 and size > 0 and first + size <= whole
        for first, size, whole in zip(chunk.offsets, chunk.sizes, shape, strict=True)
    )
