"""What goes along, as `torch.save` writes it: the same values give the same bytes."""

import io
import pickle
from collections.abc import Callable
from typing import Any

import torch

from ep_plugin.checkpoint.carried import STAND_INS, is_carried, kind_of
from ep_plugin.checkpoint.inert import Made, Name
from ep_plugin.errors import ConfigError


class _ByValue:
    """One object for all that are equal and cannot be changed.

    A pickle refers back to an object that it has written: by identity, which equal strings share or
    not as Python likes. Lists and dictionaries stay the objects that they were read as.
    """

    def __init__(self) -> None:
        self._of_key: dict[Any, Any] = {}
        self._of_id: dict[int, tuple[Any, Any]] = {}  # with the object, so that its id stays its

    def one(self, value: Any) -> Any:
        if type(value) not in (str, bytes, tuple, Name, Made):
            return value
        if id(value) not in self._of_id:
            key, same = self._key(value)
            self._of_id[id(value)] = value, self._of_key.setdefault((type(value), key), same)
        return self._of_id[id(value)][1]

    def _key(self, value: Any) -> tuple[Any, Any]:
        """Return what equal values have in common, and this one made of single objects."""
        if type(value) is tuple:
            value = tuple(self.one(item) for item in value)
            return tuple(_key_of_item(item) for item in value), value
        if type(value) is Made:
            if not is_carried(value):
                return id(value), value
            arguments = tuple((type(argument), argument) for argument in value.arguments)
            return (value.kind.key, arguments), value
        return (value.key if type(value) is Name else value), value


def _key_of_item(item: Any) -> Any:
    if type(item) in (int, float, bool):
        return type(item), repr(item) if type(item) is float else item  # -0.0 is not 0.0
    return id(item)


class _Pickler(pickle._Pickler):
    """The Python pickler: the C one insists on importing every class it names.

    What it writes depends on values alone, so that a conversion gives the same bytes each time.
    """

    write: Callable[[bytes], object]
    memoize: Callable[[object], None]
    get: Callable[[int], bytes]
    memo: dict[int, tuple[int, Any]]

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._by_value = _ByValue()

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        obj = self._by_value.one(obj)
        if type(obj) is Made and is_carried(obj) and id(obj) not in self.memo:
            self._save_name(self._by_value.one(obj.kind))
            self.save(obj.arguments)
            self.write(pickle.REDUCE)
            self.memoize(obj)
        elif type(obj) in STAND_INS and id(obj) not in self.memo:
            raise ConfigError(f"{kind_of(obj)} cannot go along into a new checkpoint")
        elif type(obj) in (set, frozenset) and id(obj) not in self.memo:
            self._save_set(obj)
        else:
            super().save(obj, save_persistent_id)  # type: ignore[misc]  # not in the stubs

    def _save_set(self, items: set[Any] | frozenset[Any]) -> None:
        """Write a set's items in an order of their values: its own changes with each process."""
        for item in items:
            if type(item) in STAND_INS:
                raise ConfigError(
                    f"a set with {kind_of(item)} cannot go along into a new checkpoint"
                )
        ordered = sorted(items, key=lambda item: (type(item).__name__, repr(item)))
        super().save_reduce(type(items), (ordered,), obj=items)  # type: ignore[misc]

    def _save_name(self, name: Name) -> None:
        if id(name) in self.memo:
            self.write(self.get(self.memo[id(name)][0]))
        else:
            self.write(b"c" + f"{name.module}\n{name.name}\n".encode())
            self.memoize(name)


class _PickleCarried:
    """The pickle module to hand to `torch.save`."""

    Pickler = _Pickler


def carried_bytes(value: Any) -> bytes:
    """Return what `torch.save` writes of a value; raises ConfigError for an object on no list."""
    buffer = io.BytesIO()
    torch.save(value, buffer, pickle_module=_PickleCarried)
    return buffer.getvalue()
