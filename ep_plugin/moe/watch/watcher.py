"""A thread on each rank that says which rank the others wait for. It ends no run, and delays none.

Two things make it speak, once for a host or for all ranks, on standard error:

    a process of this host is gone, and did not say that it ends    at once
    this rank has not moved for `after` seconds, then twice that     the lowest such rank

It reads memory of this host and what ranks tell in the store (`post.py`): a rank whose texts stop
is silent. What waits in C++ without Python's lock does not hold it.
"""

import os
import select
import threading
import time
from dataclasses import replace
from typing import Any

from ep_plugin.moe.watch.blame import (
    DIED,
    FAILED,
    SILENT,
    UNREACHED,
    Known,
    fault_of,
    sentence,
    slow_sentence,
    slow_work,
    to_blame,
)
from ep_plugin.moe.watch.neighbours import HOST, Neighbour
from ep_plugin.moe.watch.place import Seen, State, here
from ep_plugin.moe.watch.post import Heard, Post, say

AFTER = 20.0  # seconds without a move
SLOW = 600.0  # the same where all ranks are in one long work, such as a save
LOWER = 64  # ranks that a rank looks at to see whether one below it speaks
MISSED = 4  # texts in a row without which a rank is silent
# Places that a rank may enter whose exchange was aborted under it, until it finds out.
AFTERMATH = 100
TOGETHER = 0.03  # seconds in which ranks that die together, by one signal to all, are one event


class Watcher(threading.Thread):
    """Watches over the ranks of a job from one of them."""

    def __init__(
        self, store: Any, rank: int, ranks: int, after: float, slow: float, keeper: str
    ) -> None:
        super().__init__(name="ep_plugin-watch", daemon=True)
        self.rank, self.ranks, self.after = rank, ranks, after
        self.slow, self.keeper = slow, keeper
        # At 1,000 ranks the store gets 500 short texts a second, and at most that.
        self.interval = min(max(1.0, ranks / 500), after / 10)
        self.post = Post(store, rank, os.getpid(), self.interval)
        self.post.unmoved = self.unmoved
        self.post.descriptor = here.share()
        self._stopped = os.eventfd(0)
        self._moves, self._since = here.seen().moves, time.monotonic()
        self._next = after  # seconds without a move at which it speaks
        self._stood: Seen | None = None  # where it was when it spoke of time; it may go on
        self._spoke = False
        self._told: set[int] = set()  # neighbours whose death was told, or needs no word

    def start(self) -> None:
        self.post.start()
        try:
            super().start()
        except BaseException:
            self.post.end()
            raise

    def end(self) -> None:
        """End both threads; what this process was last in is told."""
        os.eventfd_write(self._stopped, 1)
        self.join(2.0)
        self.post.end()
        os.close(self.post.descriptor)

    def unmoved(self) -> float:
        """Return for how many seconds this rank has entered nothing."""
        moves = here.seen().moves
        if moves != self._moves:
            self._moves, self._since = moves, time.monotonic()
        return time.monotonic() - self._since

    def run(self) -> None:
        while not self._wait():
            seen = here.seen()
            if seen.state is State.RUNNING and not seen.finished:
                self._look_at_deaths()
                self._look_at_time()
            else:  # their ends need no word, and would wake this thread again and again
                self._told |= {n.rank for n in self.post.neighbours if _is_gone(n)}

    def explain(self, seconds: float) -> str | None:
        """Return who is to blame for an exchange that failed, once it is known; None if it is not.

        It looks for at most `seconds`.
        """
        end = time.monotonic() + seconds
        self.post.listen(range(self.ranks))
        while True:
            known = self._known()
            blamed = [one for one in to_blame(known) if one.fault is not None]
            if blamed:
                return sentence(known)
            if time.monotonic() > end:
                return None
            time.sleep(0.02)

    def _wait(self) -> bool:
        """Wait for the next time to look, or the end of a neighbour; return whether to end."""
        poll = select.poll()
        poll.register(self._stopped, select.POLLIN)
        for neighbour in self.post.neighbours:
            if neighbour.rank not in self._told:
                poll.register(neighbour.process, select.POLLIN)
        return any(number == self._stopped for number, _ in poll.poll(self.interval * 1000))

    def _look_at_deaths(self) -> None:
        if all(n.rank in self._told or not _is_gone(n) for n in self.post.neighbours):
            return
        time.sleep(TOGETHER)
        known = self._neighbours()
        dead = {n.rank for n in self.post.neighbours if _is_gone(n)}
        news = any(one.fault in (DIED, FAILED) for one in known if one.rank in dead - self._told)
        self._told |= dead
        alive = [one.rank for one in known if one.rank not in dead]
        if news and not self._spoke and self.rank < min(alive, default=self.ranks):
            self._spoke = True  # what dies after that dies of it
            say(sentence([self._own(), *known]))

    def _look_at_time(self) -> None:
        late = self.unmoved()
        if late < self.after - (MISSED + 1) * self.interval:
            self._look_whether_it_goes_on()
            self._next = self.after
            self.post.listen(())
            return
        lower = range(min(self.rank, LOWER))
        alone = late >= self._next and not any(map(self._speaks, lower))
        self.post.listen(range(self.ranks) if alone or self.rank == 0 else lower)
        heard_all = self.rank == 0 or late >= self._next + (MISSED + 1) * self.interval
        if not alone or not (heard_all or self._store_is_lost()):
            return
        known = self._known(strangers=not self._store_is_lost())
        is_slow = slow_work(known) and not self._store_is_lost()
        if is_slow and late < self.slow:
            return
        self._next, self._stood = 2 * late, here.seen()
        text = slow_sentence(known) if is_slow else sentence(known)
        if self._store_is_lost():
            text += f"; {self.keeper} does not answer, so ranks of other hosts are not known"
        say(f"rank {self.rank} has not moved for {late:.0f} s: {text}")

    def _look_whether_it_goes_on(self) -> None:
        """Say so once this rank is well past where it stood."""
        seen, stood = here.seen(), self._stood
        if stood is None:
            return
        if seen.iteration > stood.iteration or seen.moves > stood.moves + AFTERMATH:
            self._stood = None
            say(f"rank {self.rank} goes on, {seen.where}")

    def _speaks(self, rank: int) -> bool:
        """Whether a lower rank is alive and late too, and says what there is to say."""
        near = next((one for one in self._neighbours() if one.rank == rank), None)
        if near is not None and not _runs(near):
            return False
        if self._store_is_lost():
            return near is not None
        heard = self.post.heard.get(rank)
        return heard is not None and not self._is_silent(heard) and heard.unmoved > self.after / 2

    def _store_is_lost(self) -> bool:
        return self.post.error is not None or self.post.silent_store() > MISSED * self.interval

    def _is_silent(self, heard: Heard) -> bool:
        return time.monotonic() - heard.at > MISSED * self.interval

    def _own(self) -> Known:
        return Known(self.rank, HOST, os.getpid(), here.seen(), None, self.unmoved())

    def _neighbours(self) -> list[Known]:
        return [neighbour.known(_is_gone(neighbour)) for neighbour in self.post.neighbours]

    def _known(self, strangers: bool = False) -> list[Known]:
        """Return what is known of every rank; memory of this host goes before words.

        With `strangers` ranks that never said a word are among them.
        """
        known = {rank: self._from(rank, heard) for rank, heard in [*self.post.heard.items()]}
        for near in self._neighbours():
            seconds = known[near.rank].seconds if near.rank in known else 0.0
            known[near.rank] = replace(near, seconds=seconds)
        known[self.rank] = self._own()
        if strangers:
            for rank in range(self.ranks):
                known.setdefault(rank, self._stranger(rank))
        return [known[rank] for rank in sorted(known)]

    def _stranger(self, rank: int) -> Known:
        if rank not in self.post.unreached:
            return Known(rank, "", 0, None, SILENT)
        host, pid, why = self.post.unreached[rank]
        return Known(rank, host, pid, None, UNREACHED, why=why)

    def _from(self, rank: int, heard: Heard) -> Known:
        fault, seconds = fault_of(heard.seen), heard.unmoved
        if fault is None and self._is_silent(heard) and not heard.seen.finished:
            fault = SILENT
            seconds = max(time.monotonic() - heard.at, time.time() - heard.told)
        return Known(rank, heard.host, heard.pid, heard.seen, fault, seconds)


def _is_gone(neighbour: Neighbour) -> bool:
    poll = select.poll()
    poll.register(neighbour.process, select.POLLIN)
    return bool(poll.poll(0))


def _runs(known: Known) -> bool:
    return known.fault is None and known.seen is not None and known.seen.state is State.RUNNING
