"""How the processes of a run reach one verdict through a key-value store, torch's rendezvous.

Each rank puts a short record, rank 0 reads them all and puts the answer. Only where records differ
it asks for more: one rank of each kind puts the whole of what it has. So n ranks cost the store
O(n) requests. Nobody waits for ever: a rank that does not come is named, and one that failed on its
way says so in place of its record.

A store may serve several meetings, of a second process group or of attempts that failed: rank 0
opens each under a key that nobody had before, and says so under one known name. Another rank that
finds an earlier meeting there, by an answer that it had no part in or since it took part in this
process, waits for the next. A rank that fails leaves its sentence under the known name, with the
attempt it is of, since rank 0 may come much later. Agents of several hosts may count attempts
otherwise, so nothing else hangs on that. Keys are removed at the end, but for the known name.
"""

import json
import secrets
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

_TICK = 0.002  # seconds between two looks at the store, at first
_SLOWEST_TICK = 0.25
_STRETCH = 5.0  # seconds after which rank 0 shows that it lives, and others look for that
_FIRST_STRETCH = 0.5
_LOST = 60.0  # seconds without a sign of rank 0 after which it has ended
_SAY = 60.0  # seconds after which is said whom one waits for
_GRACE = 1.0  # seconds in which further ranks may say that they failed too
_LEAVE = 10.0  # seconds that a host of the store stays for those who have not read the answer
_past: set[tuple[str, int]] = set()  # meetings that are over, with the rank that knows


class Store(Protocol):
    """What is needed of torch's stores."""

    def set(self, key: str, value: str, /) -> None: ...
    def get(self, key: str, /) -> bytes: ...
    def add(self, key: str, value: int, /) -> int: ...
    def check(self, keys: list[str], /) -> bool: ...
    def wait(self, keys: list[str], timeout: timedelta, /) -> None: ...


@dataclass(frozen=True)
class Answer:
    """What a meeting came to: fine, or the sentence that ends every rank."""

    fine: bool
    text: str = ""  # the sentence; of a fine meeting, what rank 0 may print
    failed: tuple[int, ...] = ()  # ranks that said themselves what is wrong


@dataclass(frozen=True)
class Subject:
    """What a meeting is about.

    `judge` gets every rank's record and returns the ranks to ask for the whole of what they have;
    none: all is well. `decide` gets that of these ranks, and returns the answer.
    """

    name: str
    judge: Callable[[Sequence[Any]], Collection[int]]
    decide: Callable[[Sequence[Any], dict[int, Any]], Answer]


class Meeting:
    """One rank's part in a meeting of `size` ranks; `patience` seconds without a newcomer end it.

    Rank 0's patience counts; that of others only until rank 0 has come. `hosts`: this process keeps
    the store, and does not leave while others have yet to read it. `attempt`: which start of the
    run this is, as far as one knows. `say` prints whom one waits for.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        size: int,
        patience: float,
        hosts: bool = False,
        attempt: str = "",
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.store, self.rank, self.size = store, rank, size
        self.patience, self.hosts, self.attempt, self.say = patience, hosts, attempt, say
        self.name, self.key, self.same = "", "", False

    def agree(self, subject: Subject, record: Any, whole: Callable[[], Any]) -> Answer:
        """Return the answer that all ranks get. `record` and what `whole` returns are JSON."""
        self.name = subject.name
        if self.rank == 0:
            answer = self._lead(subject, record, whole)
        else:
            answer = self._follow(record, whole)
        self._leave(answer, _LEAVE)
        return answer

    def fail(self, name: str, sentence: str, wait: float) -> Answer | None:
        """Say that this rank failed; return the answer, None without one in `wait` s.

        Rank 0 answers at once.
        """
        self.name = name
        if self.rank == 0:
            self._open()
            answer = _of_failures({0: sentence})
            self._answer(answer)
            self._leave(answer, min(wait, _LEAVE))
            return answer
        mail = f"{name}/failed/{self.rank}"
        self.store.set(mail, json.dumps({"attempt": self.attempt, "sentence": sentence}))
        self.store.add(f"{name}/failures", 1)
        end, tick = time.monotonic() + wait, 10 * _TICK
        while time.monotonic() < end:
            if self._opened() and self._is_early():
                answer = self._read("answer")
                self._delete([mail])
                self._leave(answer, 0)
                return answer
            time.sleep(tick)
            tick = min(2 * tick, _SLOWEST_TICK)
        return None

    def _open(self) -> None:
        self.key = f"{self.name}/{secrets.token_hex(6)}"
        lead = {"key": self.key, "attempt": self.attempt}
        self.store.set(f"{self.name}/lead", json.dumps(lead))

    def _opened(self) -> bool:
        """Whether rank 0 has opened a meeting that this rank does not know to be over."""
        return bool(self.store.check([f"{self.name}/lead"])) and self._look()

    def _look(self) -> bool:
        lead = json.loads(self.store.get(f"{self.name}/lead"))
        self.key, self.same = lead["key"], lead["attempt"] == self.attempt
        return (self.key, self.rank) not in _past

    def _is_early(self) -> bool:
        """Whether there is an answer that did not wait for this rank, in this attempt."""
        if not self.same or not self.store.check([f"{self.key}/answer"]):
            return False
        found = self._get("answer")
        return "ask" not in found and not found["fine"]

    def _lead(self, subject: Subject, record: Any, whole: Callable[[], Any]) -> Answer:
        self._open()
        self._beat_at = time.monotonic()
        ended = self._all_are_there()
        if ended is not None:
            self._answer(ended)
            return ended
        records = [record, *self._records(range(1, self.size))]
        asked = sorted(subject.judge(records))
        if not asked:
            answer = Answer(True)
            self._answer(answer)
            return answer
        self._put("answer", {"ask": asked})
        others = [rank for rank in asked if rank != 0]
        found = self._wholes(others) | ({0: whole()} if 0 in asked else {})
        lost = [rank for rank in others if rank not in found]
        answer = Answer(False, _left(lost)) if lost else subject.decide(records, found)
        self._put("verdict", _as_json(answer))
        return answer

    def _follow(self, record: Any, whole: Callable[[], Any]) -> Answer:
        while self._next_meeting():
            if self.store.check([f"{self.key}/answer"]):  # before this rank came
                if self._is_early():
                    return self._read("answer")
                _past.add((self.key, self.rank))
                continue
            self._put(f"rank/{self.rank}", record)
            self.store.add(f"{self.key}/came", 1)
            lost = self._answered("answer")
            asked = self._get("answer").get("ask") if lost is None else None
            if asked is not None:
                if self.rank in asked:
                    self._put(f"whole/{self.rank}", whole())
                lost = self._answered("verdict")
            if lost is None:
                return self._read("answer" if asked is None else "verdict")
            if isinstance(lost, Answer):
                return lost
        self.key = ""
        return Answer(False, self._not_there([0]))

    def _next_meeting(self) -> bool:
        """Wait until rank 0 opens a meeting that this rank does not know; whether it does."""
        begin, tick, said = time.monotonic(), _TICK, self.rank != 1  # one of them says it
        while (waited := time.monotonic() - begin) < self.patience:
            rest = self.patience - waited
            there = self._waited(f"{self.name}/lead", rest if said else min(_SAY, rest))
            if there and self._look():
                return True
            if not said and time.monotonic() - begin >= _SAY:
                said = True
                self.say(self._waits_for([0]))
            time.sleep(tick)
            tick = min(2 * tick, _SLOWEST_TICK)
        return False

    def _answered(self, name: str) -> Answer | str | None:
        """Wait for what rank 0 puts; an Answer when rank 0 is gone, a word at another meeting."""
        beat, since, stretch = -1, time.monotonic(), _FIRST_STRETCH
        key = self.key
        while not self._waited(f"{key}/{name}", stretch):
            stretch = min(2 * stretch, _STRETCH)
            now = int(self.store.add(f"{key}/beat", 0))
            if now != beat:
                beat, since = now, time.monotonic()
            self._look()
            if self.key != key:
                return "another"
            if time.monotonic() - since > (_LOST if self.same else max(_LOST, self.patience)):
                return Answer(False, _left([0]))
        return None

    def _beat(self) -> None:
        """Show the others now and then that rank 0 lives."""
        if time.monotonic() - self._beat_at > _STRETCH:
            self._beat_at = time.monotonic()
            self.store.add(f"{self.key}/beat", 1)

    def _all_are_there(self) -> Answer | None:
        """Wait until every rank came, or one failed; an answer if some do not come."""
        there, since, tick, said = 0, time.monotonic(), _TICK, False
        failures = 0
        absent = list(range(1, self.size))
        while True:
            self._beat()
            if failures != (failures := self._failures()) and self._failed(absent):
                time.sleep(_GRACE)
                failed = self._failed(absent)
                self._delete([f"{self.name}/failed/{rank}" for rank in failed])
                return _of_failures(failed)
            now = int(self.store.add(f"{self.key}/came", 0))
            if now >= self.size - 1:
                absent = [rank for rank in absent if not self._came(rank)]
                if not absent:
                    return None
            waited = time.monotonic() - since
            if now != there:
                there, since, tick = now, time.monotonic(), _TICK
            elif waited > self.patience or (waited > _SAY and not said):
                absent = [rank for rank in absent if not self._came(rank)]
                if waited > self.patience:
                    return Answer(False, self._not_there(absent))
                said = True
                self.say(self._waits_for(absent))
            time.sleep(tick)
            tick = min(2 * tick, _SLOWEST_TICK)

    def _failures(self) -> int:
        """Return how often ranks said that they failed, in all attempts."""
        counter = f"{self.name}/failures"
        return int(self.store.add(counter, 0)) if self.store.check([counter]) else 0

    def _failed(self, ranks: Sequence[int]) -> dict[int, str]:
        """Return what ranks of this attempt failed with."""
        keys = {rank: f"{self.name}/failed/{rank}" for rank in ranks}
        said = {r: json.loads(self.store.get(k)) for r, k in keys.items() if self.store.check([k])}
        return {r: one["sentence"] for r, one in said.items() if one["attempt"] == self.attempt}

    def _came(self, rank: int) -> bool:
        return bool(self.store.check([f"{self.key}/rank/{rank}"]))

    def _waits_for(self, absent: Sequence[int]) -> str:
        what = "rank" if len(absent) == 1 else "ranks"
        return (
            f"waiting for {what} {ranges(absent)}, for up to {self.patience:.0f} s after the last "
            "that came"
        )

    def _not_there(self, absent: Sequence[int]) -> str:
        what = "rank" if len(absent) == 1 else "ranks"
        return (
            f"{what} {ranges(absent)} did not come within {self.patience:.0f} s of the last rank "
            f"that did; the output of {what} {ranges(absent)} says why; where ranks start more "
            "slowly, EP_PLUGIN_START_TIMEOUT=3600 waits for that many seconds"
        )

    def _wholes(self, ranks: Sequence[int]) -> dict[int, Any]:
        """Return what the ranks put that were asked; without those that left."""
        keys = {rank: f"{self.key}/whole/{rank}" for rank in ranks}
        end = time.monotonic() + self.patience
        found = {}
        for rank, key in keys.items():
            while not (there := self._waited(key, _FIRST_STRETCH)) and time.monotonic() < end:
                self._beat()
            if there:
                found[rank] = self._get(f"whole/{rank}")
        return found

    def _records(self, ranks: Sequence[int]) -> list[Any]:
        keys = [f"{self.key}/rank/{rank}" for rank in ranks]
        if not keys:
            return []
        try:
            values = self.store.multi_get(keys)
        except (RuntimeError, AttributeError):  # not every store has it
            values = [self.store.get(key) for key in keys]
        return [json.loads(value) for value in values]

    def _waited(self, key: str, seconds: float) -> bool:
        """Whether the key is there within that time; raises RuntimeError when the store is gone."""
        begin = time.monotonic()
        try:
            self.store.wait([key], timedelta(seconds=seconds))
        except RuntimeError as error:
            if "timeout" not in str(error).lower() and time.monotonic() - begin < seconds / 2:
                raise
            return False
        return True

    def _answer(self, answer: Answer) -> None:
        self._put("answer", _as_json(answer))

    def _put(self, name: str, value: Any) -> None:
        self.store.set(f"{self.key}/{name}", json.dumps(value))

    def _get(self, name: str) -> Any:
        return json.loads(self.store.get(f"{self.key}/{name}"))

    def _read(self, name: str) -> Answer:
        found = self._get(name)
        return Answer(found["fine"], found["text"], tuple(found["failed"]))

    def _delete(self, keys: Sequence[str]) -> None:
        with suppress(RuntimeError, NotImplementedError):  # not every store can
            for key in keys:
                self.store.delete_key(key)

    def _leave(self, answer: Answer, wait: float) -> None:
        """Remove this rank's keys, the last one all; a host of the store leaves last."""
        if not self.key:
            return
        _past.add((self.key, self.rank))
        with suppress(RuntimeError, NotImplementedError):  # a host may be gone
            gone = self.store.add(f"{self.key}/gone", 1)
            names = [f"rank/{self.rank}", f"whole/{self.rank}"] if answer.fine else []
            if answer.fine and gone == self.size:
                names += ["answer", "verdict", "came", "beat", "gone"]
            self._delete([f"{self.key}/{name}" for name in names])
            end = time.monotonic() + wait
            while self.hosts and not answer.fine and time.monotonic() < end:
                if self.store.add(f"{self.key}/gone", 0) >= self.size:
                    break
                time.sleep(_SLOWEST_TICK)


def ranges(ranks: Sequence[int]) -> str:
    """Return ranks as people write them: 0-3, 5 and 7."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    words = [
        word for a, b in runs for word in ([f"{a}-{b}"] if b > a + 1 else map(str, range(a, b + 1)))
    ]
    if len(words) > 8:
        words = [*words[:7], "others"]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _left(ranks: Sequence[int]) -> str:
    return (
        f"{'rank' if len(ranks) == 1 else 'ranks'} {ranges(ranks)} ended while the ranks compared "
        "their settings; the output there says why"
    )


def _as_json(answer: Answer) -> dict[str, Any]:
    return {"fine": answer.fine, "text": answer.text, "failed": answer.failed}


def _of_failures(failures: dict[int, str]) -> Answer:
    """Say which ranks failed, and why; ranks of one reason together."""
    why: dict[str, list[int]] = {}
    for rank, sentence in failures.items():
        why.setdefault(sentence, []).append(rank)
    parts = [
        f"{'rank' if len(ranks) == 1 else 'ranks'} {ranges(ranks)} failed at the start: {sentence}"
        for sentence, ranks in list(why.items())[:3]
    ]
    return Answer(False, "; ".join(parts), tuple(failures))
