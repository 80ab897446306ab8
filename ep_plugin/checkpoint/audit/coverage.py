"""Do the parts of each tensor cover it exactly once, and do they hold what they should?"""

import itertools
import re
from collections import defaultdict
from collections.abc import Iterator
from math import prod

import torch

from ep_plugin.checkpoint.audit.facts import Facts, Place
from ep_plugin.checkpoint.audit.stored_names import Name, label, parse
from ep_plugin.checkpoint.audit.verdict import Finding
from ep_plugin.checkpoint.tensors import Chunk, Stored


def check(stored: Stored, facts: dict[str, Facts]) -> tuple[set[tuple[str, Place]], list[Finding]]:
    """Return what is wrong with single tensors: holes, overlaps, unreadable parts, values.

    With it goes which tensors are not whole, by layer and expert.
    """
    findings, broken = [], set()
    for key, info in stored.tensors.items():
        name = parse(key)
        for message, places in _misplaced(name, info.shape, stored.chunks[key]):
            for place, count in places.items():
                text = f"{count} elements {message}"
                findings.append(Finding("error", "coverage", label(key, *place), text))
                broken.add((key, place))
        for place, count in facts[key].nonfinite.items():
            findings.append(
                Finding("error", "values", label(key, *place), f"{count} values are nan or inf")
            )
        for message in facts[key].unreadable:
            findings.append(Finding("error", "files", key, message))
        for dtype in sorted(facts[key].dtypes - {str(info.dtype)}):
            message = f"a part of it is {dtype}, where .metadata says {info.dtype}"
            findings.append(Finding("error", "dtype", key, message))
    return broken, findings + _unlike_other_layers(stored)


def _unlike_other_layers(stored: Stored) -> list[Finding]:
    """Return which tensors have another dtype than the same of most other layers and experts."""
    same: dict[str, dict[str, str]] = defaultdict(dict)  # without numbers -> stored name -> dtype
    for key, info in stored.tensors.items():
        dtype = str(info.dtype).removeprefix("torch.")
        same[re.sub(r"\.\d+\.", ".#.", key)][key] = dtype
    findings = []
    for found in same.values():
        dtypes = list(found.values())
        usual = max(dict.fromkeys(dtypes), key=dtypes.count)
        findings += [
            Finding("error", "dtype", key, f"is {dtype}, where the same of others is {usual}")
            for key, dtype in found.items()
            if dtype != usual
        ]
    return findings


def _misplaced(
    name: Name, shape: tuple[int, ...], chunks: tuple[Chunk, ...]
) -> Iterator[tuple[str, dict[Place, int]]]:
    """Yield what is wrong, and how many elements of which layer and expert it is wrong of.

    Every begin and end of a chunk is a line of a grid; each cell must be in exactly one chunk.
    """
    inside = [chunk for chunk in chunks if _is_inside(chunk, shape)]
    if len(inside) < len(chunks):
        strange = next(chunk for chunk in chunks if not _is_inside(chunk, shape))
        place = name.place(strange.offsets) if len(strange.offsets) == len(shape) else (None, None)
        yield f"lie outside its shape {list(shape)}", {place: prod(strange.sizes)}
    lines = [_lines(axis, name, shape, inside) for axis in range(len(shape))]
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
            places[name.place(begins)] = places.get(name.place(begins), 0) + size
        if places:
            yield message, places


def _lines(axis: int, name: Name, shape: tuple[int, ...], chunks: list[Chunk]) -> list[int]:
    """Return where cells begin and end on an axis; layers and experts are cells of their own."""
    if axis < name.lead:
        return list(range(shape[axis] + 1))
    ends = ((c.offsets[axis], c.offsets[axis] + c.sizes[axis]) for c in chunks)
    return sorted({0, shape[axis], *itertools.chain.from_iterable(ends)})


def _is_inside(chunk: Chunk, shape: tuple[int, ...]) -> bool:
    return len(chunk.offsets) == len(shape) == len(chunk.sizes) and all(
        first >= 0 and first + size <= whole
        for first, size, whole in zip(chunk.offsets, chunk.sizes, shape, strict=True)
    )
