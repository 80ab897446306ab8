"""What ranks tell each other through the rendezvous store: one short text each, every second or so.

A thread of its own, since a store that does not answer holds its caller. It has a connection of its
own, made in the thread: a store's client serves one thread, and a host that has no room for one
more does not answer. Others' texts are read only when somebody asks.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ep_plugin.moe.watch.neighbours import HOST, Neighbour, meet, space
from ep_plugin.moe.watch.place import Seen, State, here

PREFIX = "ep_plugin/places"
FIRST = (1 / 16, 1 / 8, 1 / 4)  # of the interval: when this rank looks for others at its start


@dataclass(frozen=True)
class Heard:
    """The last text of a rank, and when it was first seen here."""

    count: int
    host: str
    pid: int
    unmoved: float
    seen: Seen
    told: float  # time.time() of that rank's host
    at: float  # time.monotonic() of this one


class Post(threading.Thread):
    """Tells where this rank is every `interval` seconds, and hears the others on request."""

    def __init__(self, store: Any, rank: int, pid: int, interval: float) -> None:
        super().__init__(name="ep_plugin-post", daemon=True)
        self.rank, self.pid, self.interval = rank, pid, interval
        self.heard: dict[int, Heard] = {}
        self.unreached: dict[int, tuple[str, int, str]] = {}  # host, pid, and why no connection
        self.neighbours: list[Neighbour] = []
        self.error: str | None = None
        self.called = time.monotonic()  # when the store was last asked something
        self.waits = False  # for its answer
        self._store, self._reached = store, False  # until it is a connection of this thread's own
        self._wanted: Sequence[int] = ()
        self._wake, self._over = threading.Event(), False
        self._count = self._known = 0
        self.unmoved: Callable[[], float] = lambda: 0.0

    def listen(self, ranks: Sequence[int]) -> None:
        """Hear these ranks from now on, at once and with every text of this one."""
        if len(ranks) != len(self._wanted):
            self._wanted = ranks
            self._wake.set()

    def end(self) -> None:
        """Tell once more how this rank fares, then end."""
        self._over = True
        self._wake.set()
        self.join(2.0)

    def silent_store(self) -> float:
        """Return for how many seconds the store owes an answer."""
        return time.monotonic() - self.called if self.waits else 0.0

    def run(self) -> None:
        try:
            self._store = self._ask(self._store.clone)
            self._introduce()
            self._reached = True
            for part in FIRST:  # ranks that start together know each other soon
                self._meet()
                if self._wake.wait(part * self.interval):
                    break
            while True:
                self._once()
                if self._over:
                    return
                self._wake.wait(self.interval)
                self._wake.clear()
        except Exception as error:  # the store is gone: the watcher says so, if it matters
            self.error, self.waits = first_line(error), False
            if not (self._reached or self._over):
                self._say_unreached()

    def _say_unreached(self) -> None:
        """Say once for all ranks, as far as the job's own connection can tell, what is missing."""
        try:
            why = json.dumps([HOST, self.pid, self.error])
            self._store.set(f"{self.rank}/unreached", why)
            first = self._store.add("unreached", 1) == 1
        except Exception:  # a store that counts nothing
            first = self.rank == 0
        if first:
            say(
                f"rank {self.rank} is not watched, since it gets no connection of its own to the "
                f"rendezvous store ({self.error}); the run goes on, and other ranks in this state "
                "are named only when others wait"
            )

    def _introduce(self) -> None:
        number = self._ask(self._store.add, f"{space()}/ranks", 1)
        self._ask(
            self._store.set,
            f"{space()}/{number}",
            json.dumps([self.rank, self.pid, self.descriptor]),
        )

    descriptor = -1  # of this process's memory

    def _once(self) -> None:
        self._count += 1
        seen = here.seen()
        text = json.dumps([self._count, HOST, self.pid, self.unmoved(), asdict(seen), time.time()])
        self._ask(self._store.set, f"{self.rank}", text)
        self._meet()
        for rank, found in self._read([f"{r}" for r in self._wanted]).items():
            count, host, pid, unmoved, fields, told = json.loads(found)
            before = self.heard.get(int(rank))
            if before is None or before.count != count:
                seen = Seen(**{**fields, "state": State(fields["state"])})
                now = time.monotonic()
                self.heard[int(rank)] = Heard(count, host, pid, unmoved, seen, told, now)
        strangers = [r for r in self._wanted if r not in self.heard and r not in self.unreached]
        for key, found in self._read([f"{r}/unreached" for r in strangers]).items():
            host, pid, why = json.loads(found)
            self.unreached[int(key.partition("/")[0])] = host, pid, why

    def _meet(self) -> None:
        """Look for ranks of this host that have come since."""
        there = self._ask(self._store.add, f"{space()}/ranks", 0)
        names = [f"{space()}/{number}" for number in range(self._known + 1, there + 1)]
        found = self._read(names)
        for name in names:
            if name not in found:
                return  # it has a number, and has not said its name yet
            self._known += 1
            rank, pid, descriptor = json.loads(found[name])
            neighbour = None if rank == self.rank else meet(rank, pid, descriptor)
            if neighbour is not None:
                self.neighbours = [*self.neighbours, neighbour]

    def _read(self, keys: list[str]) -> dict[str, bytes]:
        """Return the texts there are; asking for one that is not there would wait for it."""
        if not keys:
            return {}
        if not self._ask(self._store.check, keys):
            keys = [key for key in keys if self._ask(self._store.check, [key])]
        return dict(zip(keys, self._ask(self._store.multi_get, keys), strict=True)) if keys else {}

    def _ask(self, function: Callable[..., Any], *arguments: Any) -> Any:
        self.called, self.waits = time.monotonic(), True
        result = function(*arguments)
        self.waits = False
        return result


def first_line(error: BaseException) -> str:
    """Return an error's first line, or its kind where it has no words."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def say(text: str) -> None:
    """Write one line on standard error, past buffers that a blocked thread may hold."""
    os.write(2, f"ep_plugin: {text}\n".encode())
