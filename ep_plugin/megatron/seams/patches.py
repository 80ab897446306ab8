"""The one patcher: changes in other people's objects, all or nothing, undone newest first.

Changes are noted first (`replace`, `wrap`, `environment`, `hide`, `enter`, `at_exit`), each with
the reason why it sits where it sits, and made by `apply`. A place is `module:attribute.attribute`.
"""

import atexit
import functools
import inspect
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from ep_plugin.megatron.seams.touchpoints import find_owner

_NOT_OWN = object()  # the owner inherits the attribute, or has none


class Patches:
    """What this process changed in other people's objects."""

    def __init__(self) -> None:
        self._noted: list[_Change] = []
        self._made: list[_Change] = []  # newest last

    @property
    def active(self) -> bool:
        """Whether anything is changed at present."""
        return bool(self._made)

    def table(self) -> list[tuple[str, str]]:
        """Return (place, why) of every change, made or noted, in their order."""
        return [(change.place, change.why) for change in (*self._made, *self._noted)]

    def replace(self, place: str, value: Any, why: str) -> None:
        """Put `value` at `place`, which `undo` deletes where the owner had none of its own."""
        self._noted.append(_Replaced(place, why, value))

    def wrap(self, place: str, wrapper: Callable[..., Any], why: str) -> None:
        """Let `wrapper(original, *args, **kwargs)` be called where the function at `place` was.

        Of a method, `args` begin with its `self`, of a class method with its class.
        """
        self._noted.append(_Wrapped(place, why, wrapper))

    def environment(self, name: str, value: str, why: str) -> None:
        """Set an environment variable where it is unset."""
        self._noted.append(_Variable(name, why, value))

    def hide(self, package: str, why: str) -> None:
        """Let importing a package, and all below it, fail as if it was not installed."""
        self._noted.append(_Hidden(package, why))

    def enter(self, context: AbstractContextManager[Any], why: str) -> None:
        """Be inside a context from `apply` to `undo`."""
        self._noted.append(_Entered(type(context).__name__, why, context))

    def at_exit(self, function: Callable[[], None], why: str) -> None:
        """Call `function` when Python ends."""
        self._noted.append(_AtExit(function.__name__, why, function))

    def apply(self) -> None:
        """Make the changes that are noted; a later call makes those noted since.

        Every owner is looked up before anything is changed: a module imported late may bind a name
        of another. On an error all that this object ever changed is undone and the error raised:
        ImportError or AttributeError where a place is not there, TypeError where no function is.
        """
        noted, self._noted = self._noted, []
        try:
            for change in noted:
                change.find()
            for change in noted:
                change.make()
                self._made.append(change)
        except BaseException:
            self.undo()
            raise

    def verify(self) -> list[str]:
        """Return one sentence for each place that no longer has what was put there."""
        newest = {change.place: change for change in self._made}
        return [text for text in (change.lost() for change in newest.values()) if text is not None]

    def undo(self) -> list[str]:
        """Take all changes back, newest first; does nothing when there are none.

        What somebody replaced after us stays as it is, and one sentence for each such place is
        returned. A wrapper of ours that theirs calls does nothing but call the original.
        """
        left: dict[str, str] = {}
        while self._made:
            change = self._made.pop()
            text = change.lost()
            change.undo()
            if text is not None:
                left.setdefault(change.place, text)
        return list(left.values())


class _Change(ABC):
    """One change: where, and why there."""

    def __init__(self, place: str, why: str) -> None:
        self.place, self.why = place, why

    def find(self) -> None:  # noqa: B027  most kinds have nothing to look up
        """Raise where the change cannot be made; change nothing."""

    @abstractmethod
    def make(self) -> None: ...

    def lost(self) -> str | None:
        """Say that the place no longer has what was put there; None where it has."""
        return None

    @abstractmethod
    def undo(self) -> None:
        """Take it back, unless it is lost."""


class _Replaced(_Change):
    """A value in place of an attribute's."""

    def __init__(self, place: str, why: str, value: Any) -> None:
        super().__init__(place, why)
        self.value = value
        self.owner: Any = None
        self.name, self.before = "", _NOT_OWN

    def find(self) -> None:
        self.owner, self.name = find_owner(self.place)
        self._own()  # a TypeError for an owner whose attributes cannot be looked at

    def make(self) -> None:
        self.before = self._own()
        setattr(self.owner, self.name, self.value)

    def lost(self) -> str | None:
        now = self._own()
        if now is self.value:
            return None
        said = repr(now) if now is not _NOT_OWN else "gone"
        return f"{self.place} is no longer what ep_plugin put there, it is {said}"

    def undo(self) -> None:
        if self._own() is not self.value:
            return
        if self.before is _NOT_OWN:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self.before)

    def _own(self) -> Any:
        """Return what stands in the owner itself, as it stands there: `staticmethod` and all."""
        return vars(self.owner).get(self.name, _NOT_OWN)


class _Wrapped(_Replaced):
    """A wrapper around a function, until `undo`: somebody else may still call it then."""

    def __init__(self, place: str, why: str, wrapper: Callable[..., Any]) -> None:
        super().__init__(place, why, None)
        self.wrapper = wrapper
        self.live = True

    def find(self) -> None:
        super().find()
        if not callable(getattr(self.owner, self.name)):
            raise TypeError(f"{self.place} is no function; use replace to put a value there")

    def make(self) -> None:
        kind = inspect.getattr_static(self.owner, self.name, None)
        if isinstance(kind, staticmethod | classmethod):
            self.value = type(kind)(self._around(kind.__func__))
        else:
            self.value = self._around(getattr(self.owner, self.name))
        super().make()

    def undo(self) -> None:
        self.live = False
        super().undo()

    def _around(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def replacement(*args: Any, **kwargs: Any) -> Any:
            if not self.live:
                return original(*args, **kwargs)
            return self.wrapper(original, *args, **kwargs)

        return replacement


class _Variable(_Change):
    """An environment variable."""

    def __init__(self, name: str, why: str, value: str) -> None:
        super().__init__(name, why)
        self.value, self.was_set = value, True

    def make(self) -> None:
        self.was_set = self.place in os.environ
        os.environ.setdefault(self.place, self.value)

    def lost(self) -> str | None:
        now = os.environ.get(self.place)
        if self.was_set or now == self.value:
            return None
        said = repr(now) if now is not None else "gone"
        return f"{self.place} is no longer what ep_plugin put there, it is {said}"

    def undo(self) -> None:
        if not self.was_set and self.lost() is None:
            del os.environ[self.place]


class _Hidden(_Change):
    """A package that cannot be imported, with what was loaded of it before."""

    def make(self) -> None:
        below = f"{self.place}."
        self.before = {
            name: module
            for name, module in sys.modules.items()
            if name == self.place or name.startswith(below)
        }
        for name in (self.place, *self.before):
            sys.modules[name] = None  # type: ignore[assignment]

    def undo(self) -> None:
        for name in (self.place, *self.before):
            if sys.modules.get(name, _NOT_OWN) is None:
                del sys.modules[name]
                if name in self.before:
                    sys.modules[name] = self.before[name]


class _Entered(_Change):
    """A context that is entered."""

    def __init__(self, name: str, why: str, context: AbstractContextManager[Any]) -> None:
        super().__init__(name, why)
        self.context = context

    def make(self) -> None:
        self.context.__enter__()

    def undo(self) -> None:
        self.context.__exit__(None, None, None)


class _AtExit(_Change):
    """A function to be called when Python ends."""

    def __init__(self, name: str, why: str, function: Callable[[], None]) -> None:
        super().__init__(name, why)
        self.function = function

    def make(self) -> None:
        atexit.register(self.function)

    def undo(self) -> None:
        atexit.unregister(self.function)
