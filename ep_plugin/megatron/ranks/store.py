"""Where a meeting is held: keys of a store, torch's rendezvous, and how patiently it is looked at.

NAME/lead             {"key": KEY} of the newest meeting; stays
NAME/left/RANK        why a rank failed that went before rank 0 came, until it comes again
KEY/rank/RANK         a rank's record          KEY/came      how many there are
KEY/failed/RANK       a rank failed, and why   KEY/failures  how many did
KEY/answer            the answer, or whom rank 0 asks for the whole
KEY/whole/RANK        the whole                KEY/verdict   the answer then
KEY/beat              moves while rank 0 is there; missing: all have left
KEY/gone              how many have left
"""

import json
import time
from collections.abc import Iterable
from contextlib import suppress
from datetime import timedelta
from itertools import islice
from typing import Any, Protocol

from ep_plugin.untrusted import cut

TICK = 0.002  # seconds between two looks at the store, at first
SLOWEST_TICK = 0.25
STRETCH = 5.0  # seconds after which rank 0 shows that it lives, and others look for that
FIRST_STRETCH = 0.5
ALIVE = 3.0  # seconds in which a rank 0 that has answered and is still there shows it
LOST = 60.0  # seconds without a sign of rank 0 after which it has ended
SAY = 60.0  # seconds after which is said whom one waits for
GRACE = 1.0  # seconds in which further ranks may say that they failed too
MOST_ASKED, MOST_SAID = 64, 3  # ranks that are asked for what they left, and that are said
LONGEST = 2000  # characters of what one left
LEAVE = 10.0  # seconds that rank 0 stays for those who have not read its refusal

_ABSENT = "absent"  # no JSON


class Store(Protocol):
    """What is needed of torch's stores."""

    def set(self, key: str, value: str, /) -> None: ...
    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes: ...
    def get(self, key: str, /) -> bytes: ...
    def add(self, key: str, value: int, /) -> int: ...
    def check(self, keys: list[str], /) -> bool: ...
    def wait(self, keys: list[str], timeout: timedelta, /) -> None: ...


class Place:
    """A store, and the key of the meeting that this rank is in; values are JSON."""

    def __init__(self, store: Any, name: str) -> None:
        self.store, self.name, self.key = store, name, ""

    def put(self, name: str, value: Any) -> None:
        self.store.set(f"{self.key}/{name}", json.dumps(value))

    def get(self, name: str) -> Any:
        return json.loads(self.store.get(f"{self.key}/{name}"))

    def found(self, name: str) -> Any:
        """Return the value, None where it is not there: it may be removed at any time."""
        return self._found(f"{self.key}/{name}")

    def _found(self, key: str) -> Any:
        # One request: a `get` of what went after a `check` would wait for it.
        value = self.store.compare_set(key, _ABSENT, _ABSENT)
        return None if value == _ABSENT.encode() else json.loads(value)

    def has(self, name: str) -> bool:
        return bool(self.store.check([f"{self.key}/{name}"]))

    def add(self, name: str, number: int = 0) -> int:
        return int(self.store.add(f"{self.key}/{name}", number))

    def waited(self, name: str, seconds: float) -> bool:
        return self.waited_for(f"{self.key}/{name}", seconds)

    def waited_for(self, key: str, seconds: float) -> bool:
        """Whether the key is there within that time; raises RuntimeError when the store is gone."""
        begin = time.monotonic()
        try:
            self.store.wait([key], timedelta(seconds=seconds))
        except RuntimeError as error:
            if "timeout" not in str(error).lower() and time.monotonic() - begin < seconds / 2:
                raise
            return False
        return True

    def delete(self, names: Iterable[str]) -> None:
        self.delete_keys(f"{self.key}/{name}" for name in names)

    def delete_keys(self, keys: Iterable[str]) -> None:
        with suppress(RuntimeError, NotImplementedError):  # not every store can
            for key in keys:
                self.store.delete_key(key)

    def of_ranks(self, ranks: Iterable[int]) -> list[Any]:
        """Return the records of ranks that have come."""
        keys = [f"{self.key}/rank/{rank}" for rank in ranks]
        if not keys:
            return []
        try:
            values = self.store.multi_get(keys)
        except (RuntimeError, AttributeError):  # not every store has it
            values = [self.store.get(key) for key in keys]
        return [json.loads(value) for value in values]

    def open(self, key: str) -> None:
        """Open a meeting under `key`, which nobody had before."""
        self.key = f"{self.name}/{key}"
        self.add("beat", 1)
        self.store.set(f"{self.name}/lead", json.dumps({"key": self.key}))

    def look(self) -> str:
        """Return the key of the newest meeting, which there is."""
        self.key = str(json.loads(self.store.get(f"{self.name}/lead"))["key"])
        return self.key

    def leave_word(self, rank: int, sentence: str) -> None:
        """Leave for a rank 0 that comes later why `rank` failed."""
        self.store.set(f"{self.name}/left/{rank}", json.dumps(sentence))

    def take_word(self, rank: int) -> None:
        self.delete_keys([f"{self.name}/left/{rank}"])

    def words(self, ranks: Iterable[int]) -> str:
        """Say what ranks left that went; of this start or an earlier one, nobody knows.

        Of some of them: a value is cut, and not every rank of thousands is asked for.
        """
        said: list[str] = []
        for rank in islice(ranks, MOST_ASKED):
            sentence = self._found(f"{self.name}/left/{rank}")
            if sentence is not None:
                said.append(
                    f"; rank {rank} ended before, in this start or an earlier one: "
                    f"{cut(str(sentence), LONGEST)}"
                )
            if len(said) == MOST_SAID:
                break
        return "".join(said)
