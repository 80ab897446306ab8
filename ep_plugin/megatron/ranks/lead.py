"""Rank 0's part in a meeting: it opens it, waits for all, asks where they differ, and answers."""

import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from ep_plugin.megatron.ranks import store as pace
from ep_plugin.megatron.ranks.answers import Answer, Subject, left, not_there, of_failures
from ep_plugin.megatron.ranks.answers import waits_for as waits
from ep_plugin.megatron.ranks.store import Place


class Leader:
    """Rank 0 of `size` ranks; `patience` seconds without a newcomer end the meeting."""

    def __init__(
        self, place: Place, size: int, patience: float, say: Callable[[str], None]
    ) -> None:
        self.place, self.size, self.patience, self.say = place, size, patience, say
        place.open(secrets.token_hex(6))
        self._beat_at = time.monotonic()

    def agree(self, subject: Subject, record: Any, whole: Callable[[], Any]) -> Answer:
        ended = self._all_are_there()
        if ended is not None:
            return self.answer(ended)
        records = [record, *self.place.of_ranks(range(1, self.size))]
        asked = sorted(subject.judge(records))
        if not asked:
            return self.answer(Answer(True))
        self.place.put("answer", {"ask": asked})
        others = [rank for rank in asked if rank != 0]
        found = self._wholes(others) | ({0: whole()} if 0 in asked else {})
        lost = [rank for rank in others if rank not in found]
        return self.answer(left(lost) if lost else subject.decide(records, found), "verdict")

    def answer(self, answer: Answer, name: str = "answer") -> Answer:
        self.place.put(name, answer.as_json())
        return answer

    def stay(self, seconds: float) -> None:
        """After a refusal: show for a while that it is of this start, until all have read it."""
        end, tick = time.monotonic() + seconds, pace.TICK
        with suppress(RuntimeError):  # who keeps the store may be gone
            while self.place.add("gone") < self.size and time.monotonic() < end:
                self.place.add("beat", 1)
                time.sleep(tick)
                tick = min(2 * tick, pace.SLOWEST_TICK)

    def _beat(self, now: bool = False) -> None:
        """Show the others now and then that rank 0 lives."""
        if now or time.monotonic() - self._beat_at > pace.STRETCH:
            self._beat_at = time.monotonic()
            self.place.add("beat", 1)

    def _all_are_there(self) -> Answer | None:
        """Wait until every rank came, or one failed; an answer if some do not come."""
        there, since, tick, said = 0, time.monotonic(), pace.TICK, False
        absent = list(range(1, self.size))
        while True:
            if self.place.has("failures"):
                time.sleep(pace.GRACE)
                return of_failures(self._failed())
            now = self.place.add("came")
            if now >= self.size - 1:
                absent = self._without_those_who_came(absent)
                if not absent:
                    return None
            waited = time.monotonic() - since
            self._beat(now != there)
            if now != there:
                there, since, tick = now, time.monotonic(), pace.TICK
            elif waited > self.patience or (waited > pace.SAY and not said):
                absent = self._without_those_who_came(absent)
                words = self.place.words(absent)
                if waited > self.patience:
                    return not_there(absent, self.patience, words)
                said = True
                self.say(waits(absent, self.patience, words))
            time.sleep(tick)
            tick = min(2 * tick, pace.SLOWEST_TICK)

    def _failed(self) -> dict[int, str]:
        """Return what ranks said; one that came before can fail too."""
        names = {rank: f"failed/{rank}" for rank in range(1, self.size)}
        return {rank: self.place.get(n) for rank, n in names.items() if self.place.has(n)}

    def _without_those_who_came(self, absent: Sequence[int]) -> list[int]:
        return [rank for rank in absent if not self.place.has(f"rank/{rank}")]

    def _wholes(self, ranks: Sequence[int]) -> dict[int, Any]:
        """Return what the ranks put that were asked; without those that left."""
        end = time.monotonic() + self.patience
        found = {}
        for rank in ranks:
            name = f"whole/{rank}"
            while not (there := self.place.waited(name, pace.FIRST_STRETCH)):
                self._beat()
                if time.monotonic() >= end:
                    break
            if there:
                found[rank] = self.place.get(name)
        return found
