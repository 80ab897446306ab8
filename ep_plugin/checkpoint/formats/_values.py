"""What a pickle's stand-ins become: real values of an exact list of names, each checked.

Everything else stays what it is, a `Made` or a `Name`: inert, and never written (`carried.py`).
"""

from typing import Any

import torch
from torch import Tensor

from ep_plugin.checkpoint.formats._archive import Archive
from ep_plugin.checkpoint.formats._keys import Keys
from ep_plugin.checkpoint.formats._listed import BUILDERS, MAX_SIZE, NAMED, SETS, items_of_set, need
from ep_plugin.checkpoint.inert import Made, Name, Persistent, Unreadable, Unsupported
from ep_plugin.untrusted import cut

MAX_DEPTH = 100
_STORAGES = {  # as torch.save names them; dtypes without one are saved untyped
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}


class Values:
    """Turns what one pickle holds into values; `archive` has the storages of its tensors."""

    def __init__(self, archive: Archive | None) -> None:
        self._archive = archive
        self._built: dict[int, Any] = {}
        self._storages: dict[tuple[str, torch.dtype], Tensor] = {}
        self._keys = Keys()
        self._unchecked: dict[int, str] = {}  # where a storage's bytes begin -> its record

    def check(self, tensor: Tensor) -> None:
        """Raise Unreadable where a built tensor's storage has other bytes than were written.

        It is read once; what is asked again is not.
        """
        begin = tensor.untyped_storage().data_ptr()
        if begin in self._unchecked and self._archive is not None:
            self._archive.check(self._unchecked[begin])
            del self._unchecked[begin]

    def build(self, value: Any, depth: int = 0) -> Any:
        """Return the value; raises Unreadable where one on the list is not as it must be."""
        kind = type(value)
        if kind in _PLAIN:
            return value
        if kind is Name:
            return NAMED.get(value.key, value)
        if id(value) in self._built:
            found = self._built[id(value)]
            if found is _OPEN:
                raise Unsupported("something in it holds itself")
            return found
        if depth > MAX_DEPTH:
            raise Unsupported(f"it is nested more than {MAX_DEPTH} deep")
        self._built[id(value)] = _OPEN
        made = self._container(value, depth + 1)
        self._built[id(value)] = made
        return made

    def _container(self, value: Any, depth: int) -> Any:
        kind = type(value)
        if kind is dict:
            return {self._key(key, depth): self.build(item, depth) for key, item in value.items()}
        if kind is Made:
            return self._made(value, depth)
        if kind is Persistent:
            return self._storage(value.pid)
        if kind is set or kind is frozenset:
            return kind(self._key(item, depth) for item in value)
        return kind(self.build(item, depth) for item in value)  # list, tuple

    def _key(self, key: Any, depth: int) -> Any:
        """Return what a key becomes, which may be another kind of thing than it was."""
        built = self.build(key, depth)
        return built if built is key else self._keys.check(built)

    def _made(self, made: Made, depth: int) -> Any:
        arguments = tuple(self.build(value, depth) for value in made.arguments)
        state = self.build(made.state, depth)
        items = None
        if made.items is not None:
            items = [(self._key(k, depth), self.build(v, depth)) for k, v in made.items]
        same = Made(made.kind, arguments, made.called)
        same.state, same.items = state, items
        if made.kind.key in SETS:
            return SETS[made.kind.key](map(self._keys.check, items_of_set(same)))
        builder = BUILDERS.get(made.kind.key)
        return same if builder is None else builder(same)

    def _storage(self, pid: Any) -> Tensor:
        """Return the values of a storage, one after the other."""
        need(type(pid) is tuple and len(pid) == 5 and pid[0] == "storage", "a reference", pid)
        _, kind, key, _, count = pid
        dtype = _STORAGES.get(kind.name) if type(kind) is Name else None
        known = dtype is not None and kind.module in ("torch", "torch.storage")
        need(known and type(key) is str, "a storage's kind", kind)
        need(type(count) is int and 0 <= count <= MAX_SIZE, "a storage's length", count)
        assert dtype is not None
        if self._archive is None:
            raise Unreadable("it refers to a tensor, and none is beside it")
        if (key, dtype) not in self._storages:
            record = self._archive.storage(key)
            if record.size < count * dtype.itemsize:
                raise Unreadable(
                    f"its data/{cut(key)} has {record.size} of {count * dtype.itemsize} bytes"
                )
            area = self._archive.data
            values = torch.empty(0, dtype=dtype)
            if count:
                values = torch.frombuffer(area, dtype=dtype, count=count, offset=record.start)
                self._unchecked[values.untyped_storage().data_ptr()] = f"data/{key}"
            self._storages[key, dtype] = values
        found = self._storages[key, dtype]
        need(found.numel() == count, "a storage's length", count)
        return found


_PLAIN = frozenset((str, int, float, bool, bytes, bytearray, type(None)))
_OPEN = object()
