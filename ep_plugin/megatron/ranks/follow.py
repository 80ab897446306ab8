"""The part of every rank but rank 0 in a meeting: find it, come, and read the answer."""

import time
from collections.abc import Callable
from typing import Any

from ep_plugin.megatron.ranks import store as pace
from ep_plugin.megatron.ranks.answers import Answer, left, not_there, of_json, waits_for
from ep_plugin.megatron.ranks.store import Place


class Follower:
    """Rank `rank`; `past` has the keys of meetings that are over for this process."""

    def __init__(
        self, place: Place, rank: int, patience: float, say: Callable[[str], None], past: set[str]
    ) -> None:
        self.place, self.rank, self.patience = place, rank, patience
        self.say, self.past = say, past
        self.before = ""  # what ended an earlier start

    def agree(self, record: Any, whole: Callable[[], Any]) -> Answer:
        self.place.take_word(self.rank)
        while self._next_meeting():
            if self.place.has("answer"):  # before this rank came
                refusal = self._refusal_of_this_start()
                if refusal is not None:
                    return refusal
                continue
            self.place.put(f"rank/{self.rank}", record)
            self.place.add("came", 1)
            found = self._answered("answer")
            if isinstance(found, dict) and "ask" in found:
                if self.rank in found["ask"]:
                    self.place.put(f"whole/{self.rank}", whole())
                found = self._answered("verdict")
            if found is not None:
                return found if isinstance(found, Answer) else of_json(found)
        self.place.key = ""
        return not_there([0], self.patience, self._before())

    def fail(self, sentence: str, wait: float) -> Answer | None:
        """Say in each meeting that opens that this rank failed; the answer, None without one."""
        self.place.leave_word(self.rank, sentence)
        end, tick, told = time.monotonic() + wait, 10 * pace.TICK, ""
        while time.monotonic() < end:
            if self._opened():
                if self.place.has("answer"):
                    answer = self._refusal_of_this_start(self.place.key == told)
                    if answer is not None:
                        self.place.take_word(self.rank)
                        return answer
                elif self.place.key != told:
                    told = self.place.key
                    self.place.put(f"failed/{self.rank}", sentence)
                    self.place.add("failures", 1)
            time.sleep(tick)
            tick = min(2 * tick, pace.SLOWEST_TICK)
        return None

    def _opened(self) -> bool:
        """Whether rank 0 has opened a meeting that is not over for this process."""
        return bool(self.place.store.check([f"{self.place.name}/lead"])) and self._is_new()

    def _is_new(self) -> bool:
        key = self.place.look()
        if key not in self.past and not self.place.has("beat"):
            self.past.add(key)
        return key not in self.past

    def _refusal_of_this_start(self, took_part: bool = False) -> Answer | None:
        """Return the refusal that is there, if rank 0 of this start gave it.

        Starts cannot be told by what they are called: agents count them otherwise. But a rank 0
        that is still there, after its answer, is of the same start as this rank.
        """
        found = self.place.found("answer")
        if found is None:  # its ranks have left meanwhile, the last one removed it
            self.past.add(self.place.key)
            return None
        refused = "ask" not in found and not found["fine"]
        if refused and (took_part or self._leader_is_there()):
            return of_json(found)
        self.past.add(self.place.key)
        if refused:
            self.before = found["text"]
            self.say(f"an earlier start ended; waiting for rank 0 to start again{self._before()}")
        return None

    def _leader_is_there(self) -> bool:
        beat, end = self.place.add("beat"), time.monotonic() + pace.ALIVE
        while time.monotonic() < end:
            time.sleep(pace.SLOWEST_TICK / 2)
            if self.place.add("beat") != beat:
                return True
        return False

    def _before(self) -> str:
        return f"; the earlier start ended with: {self.before}" if self.before else ""

    def _next_meeting(self) -> bool:
        """Wait until rank 0 opens a meeting that this rank does not know; whether it does."""
        begin, tick, said = time.monotonic(), pace.TICK, self.rank != 1  # one of them says it
        while (waited := time.monotonic() - begin) < self.patience:
            rest = self.patience - waited
            lead = f"{self.place.name}/lead"
            there = self.place.waited_for(lead, rest if said else min(pace.SAY, rest))
            if there and self._is_new():
                return True
            if not said and time.monotonic() - begin >= pace.SAY:
                said = True
                self.say(waits_for([0], self.patience, self._before()))
            time.sleep(tick)
            tick = min(2 * tick, pace.SLOWEST_TICK)
        return False

    def _answered(self, name: str) -> dict[str, Any] | Answer | None:
        """Return what rank 0 puts, an Answer when rank 0 is gone, None at another meeting."""
        key, beat, since = self.place.key, -1, time.monotonic()
        stretch, seen = pace.FIRST_STRETCH, False  # whether rank 0 was there since this rank came
        while not self.place.waited(name, stretch):
            stretch = min(2 * stretch, pace.STRETCH)
            now = self.place.add("beat")
            if now != beat:
                seen = beat >= 0
                beat, since = now, time.monotonic()
            if self.place.look() != key:
                return None
            if time.monotonic() - since > (pace.LOST if seen else max(pace.LOST, self.patience)):
                return left([0])
        found: dict[str, Any] | None = self.place.found(name)
        if found is None:  # of an earlier start, whose last rank removed it
            self.past.add(key)
        return found
