"""What stands for the objects of a pickle that is not trusted: nothing of it is imported or run.

`formats/_pickle.py` makes them; `carried.py` has the few that may go into a new checkpoint.
"""

from typing import Any

from ep_plugin.untrusted import cut


class Unreadable(ValueError):
    """Bytes that are not what they should be; says why, as part of a sentence."""


class Unsupported(Unreadable):
    """Bytes that may well be as they were written, of a kind or size that is not read."""


class OldOpcode(Unreadable):
    """Bytes that are damaged, or a pickle of a kind that torch has not written for long."""


def explained(error: BaseException, damaged: str = "is damaged") -> str:
    """Return why a checkpoint's bytes cannot be read, and what to do, as the end of a sentence.

    A copy of what is not read helps nobody.
    """
    if isinstance(error, Unsupported):
        return (
            f"cannot be read ({error}); it may be whole: save the checkpoint without that, or give "
            "another one"
        )
    if isinstance(error, OldOpcode):
        return (
            f"{damaged} ({error}); copy the checkpoint again; if it was saved by Python 2 or with "
            "pickle_protocol=0 or 1, load it with torch where you trust it, and save it anew with "
            "torch.save, without pickle_protocol"
        )
    return f"{damaged} ({error}); copy the checkpoint again"


class Name:
    """What a pickle calls `module.name`; the same object wherever one file says it."""

    __slots__ = ("module", "name")

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name

    @property
    def key(self) -> tuple[str, str]:
        return self.module, self.name

    def __repr__(self) -> str:
        return cut(f"{self.module}.{self.name}", 80)


class Made:
    """What a pickle wants made: by a call, kind(*arguments), or kind.__new__(kind, *arguments)."""

    __slots__ = ("arguments", "called", "items", "kind", "state")

    def __init__(self, kind: Name, arguments: tuple[Any, ...], called: bool) -> None:
        self.kind, self.arguments, self.called = kind, arguments, called
        self.state: Any = None
        self.items: list[tuple[Any, Any]] | None = None  # of a dictionary's subclass

    def __repr__(self) -> str:
        return f"an object of {self.kind}"


class Persistent:
    """A reference to something beside the pickle."""

    __slots__ = ("pid",)

    def __init__(self, pid: Any) -> None:
        self.pid = pid
