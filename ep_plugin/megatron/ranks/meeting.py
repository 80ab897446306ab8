"""How the processes of a run reach one verdict through a key-value store, torch's rendezvous.

Each rank puts a short record, rank 0 reads them all and puts the answer. Only where records differ
it asks for more: one rank of each kind puts the whole of what it has. So n ranks cost the store
O(n) requests. Nobody waits for ever: a rank that does not come is named, and one that failed on its
way says so in place of its record.

A store may serve several meetings, of a second process group or after a restart: a rank draws a
number when it comes, which says which meeting of that name it is in. Keys are removed at the end,
but for the counter of these numbers.
"""

import json
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

_TICK = 0.002  # seconds between two looks of rank 0 at the counters, at first
_SLOWEST_TICK = 0.25
_STRETCH = 5.0  # seconds that another rank waits for the answer before it looks who is there
_GRACE = 1.0  # seconds in which further ranks may say that they failed too
_LEAVE = 10.0  # seconds that a host of the store stays for those who have not read the answer


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

    `hosts`: this process keeps the store, and does not leave while others have yet to read it.
    """

    def __init__(
        self, store: Any, rank: int, size: int, patience: float, hosts: bool = False
    ) -> None:
        self.store, self.rank, self.size = store, rank, size
        self.patience, self.hosts = patience, hosts

    def agree(self, subject: Subject, record: Any, whole: Callable[[], Any]) -> Answer:
        """Return the answer that all ranks get. `record` and what `whole` returns are JSON."""
        self._come(subject.name)
        self._put(f"rank/{self.rank}", record)
        answer = self._lead(subject, whole) if self.rank == 0 else self._follow(whole)
        self._leave(answer)
        return answer

    def fail(self, name: str, sentence: str, wait: float) -> Answer | None:
        """Come to say that this rank failed; return the answer, None without one in `wait` s.

        Rank 0 answers at once.
        """
        self._come(name)
        self._put(f"rank/{self.rank}", {"failed": sentence})
        self.store.add(f"{self.key}/failures", 1)
        if self.rank == 0:
            answer = _of_failures({0: sentence})
            self._answer(answer)
            self._leave(answer)
            return answer
        end = time.monotonic() + wait
        while time.monotonic() < end:
            if self._waited(f"{self.key}/answer", min(_STRETCH, wait)):
                found = self._get("answer")
                if "ask" in found:
                    continue
                answer = Answer(found["fine"], found["text"], tuple(found["failed"]))
                self._leave(answer)
                return answer
        return None

    def _come(self, name: str) -> None:
        self.counter = f"{name}/came"
        self.round: int = (int(self.store.add(self.counter, 1)) - 1) // self.size
        self.key = f"{name}/{self.round}"

    def _lead(self, subject: Subject, whole: Callable[[], Any]) -> Answer:
        missing = self._all_are_there()
        if missing is not None:
            self._answer(missing)
            return missing
        records = self._records(range(self.size))
        if failed := _failures(dict(enumerate(records))):
            answer = _of_failures(failed)
        elif not (asked := sorted(subject.judge(records))):
            answer = Answer(True)
        else:
            self._put("answer", {"ask": asked})
            others = [rank for rank in asked if rank != 0]
            found = self._wholes(others) | ({0: whole()} if 0 in asked else {})
            lost = [rank for rank in others if rank not in found]
            answer = Answer(False, _left(lost)) if lost else subject.decide(records, found)
            self._put("verdict", _as_json(answer))
            return answer
        self._answer(answer)
        return answer

    def _follow(self, whole: Callable[[], Any]) -> Answer:
        answer = self._answer_in_time("answer")
        if isinstance(answer, Answer):
            return answer
        if "ask" in answer:
            if self.rank in answer["ask"]:
                self._put(f"whole/{self.rank}", whole())
            answer = self._answer_in_time("verdict")
            if isinstance(answer, Answer):
                return answer
        return Answer(answer["fine"], answer["text"], tuple(answer["failed"]))

    def _answer_in_time(self, name: str) -> Any:
        """Return what rank 0 put; an Answer of one's own if it does not come, or is gone."""
        there, since = self._number(), time.monotonic()
        while not self._waited(f"{self.key}/{name}", _STRETCH):
            now = self._number()
            if now != there:
                there, since = now, time.monotonic()
            elif time.monotonic() - since > self.patience + 2 * _STRETCH:
                came = self.store.check([f"{self.key}/rank/0"])
                return Answer(False, _left([0]) if came else self._not_there([0]))
        return self._get(name)

    def _all_are_there(self) -> Answer | None:
        """Wait until every rank came, or one failed; an answer if some do not come."""
        there, since, tick = 0, time.monotonic(), _TICK
        absent = list(range(self.size))
        while True:
            now = self._number()
            failures = self.store.add(f"{self.key}/failures", 0)
            if failures:
                time.sleep(_GRACE)
                came = [rank for rank in absent if self._came(rank)]
                return _of_failures(_failures(dict(zip(came, self._records(came), strict=True))))
            if now >= self.size:
                absent = [rank for rank in absent if not self._came(rank)]
                if not absent:
                    return None
            if now != there:
                there, since, tick = now, time.monotonic(), _TICK
            elif time.monotonic() - since > self.patience:
                absent = [rank for rank in absent if not self._came(rank)]
                return Answer(False, self._not_there(absent))
            time.sleep(tick)
            tick = min(2 * tick, _SLOWEST_TICK)

    def _number(self) -> int:
        """Return how many ranks have come to this meeting."""
        came = int(self.store.add(self.counter, 0))
        return came - self.round * self.size

    def _came(self, rank: int) -> bool:
        return bool(self.store.check([f"{self.key}/rank/{rank}"]))

    def _not_there(self, absent: Sequence[int]) -> str:
        what = "rank" if len(absent) == 1 else "ranks"
        return (
            f"{what} {ranges(absent)} did not come within {self.patience:.0f} s of the last rank "
            f"that did; the output of {what} {ranges(absent)} says why; where ranks start slowly, "
            "EP_PLUGIN_START_TIMEOUT=600 waits longer"
        )

    def _wholes(self, ranks: Sequence[int]) -> dict[int, Any]:
        """Return what the ranks put that were asked; without those that left."""
        keys = {rank: f"{self.key}/whole/{rank}" for rank in ranks}
        end = time.monotonic() + self.patience
        found = {}
        for rank, key in keys.items():
            if self._waited(key, max(0.01, end - time.monotonic())):
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

    def _leave(self, answer: Answer) -> None:
        """Remove this rank's keys, the last one all; a host of the store leaves last."""
        with suppress(RuntimeError, NotImplementedError):  # not every store can; a host may be gone
            gone = self.store.add(f"{self.key}/gone", 1)
            names = [f"rank/{self.rank}", f"whole/{self.rank}"] if answer.fine else []
            if answer.fine and gone == self.size:
                names += ["answer", "verdict", "failures", "gone"]
            for name in names:
                self.store.delete_key(f"{self.key}/{name}")
            end = time.monotonic() + _LEAVE
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


def _failures(records: dict[int, Any]) -> dict[int, str]:
    return {rank: record["failed"] for rank, record in records.items() if "failed" in record}


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
