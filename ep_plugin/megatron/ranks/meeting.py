"""How the processes of a run reach one verdict through a key-value store, torch's rendezvous.

Each rank puts a short record, rank 0 reads them all and puts the answer. Only where records differ
it asks for more: one rank of each kind puts the whole of what it has. So n ranks cost the store
O(n) requests. Nobody waits for ever: a rank that does not come is named, and one that failed on its
way says so in place of its record.

A store may serve several meetings: of a second process group, or of a start that failed. Nothing
that ranks are given tells one start from another: agents count restarts each for itself, and a
start within a process counts none. So what counts is who is there. Rank 0 opens each meeting under
a key that nobody had before. An answer is heeded by those who came before it, or while the rank 0
that gave it was there; a failure counts that its rank said in this meeting. A rank that left before
rank 0 came is waited for, as one that may start again, and what it left is said.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from ep_plugin.megatron.ranks import store as pace
from ep_plugin.megatron.ranks.answers import Answer, Subject, of_failures
from ep_plugin.megatron.ranks.follow import Follower
from ep_plugin.megatron.ranks.lead import Leader
from ep_plugin.megatron.ranks.store import Place


class Meeting:
    """One rank's part in a meeting of `size` ranks; `patience` seconds without a newcomer end it.

    Rank 0's patience counts; that of others only until rank 0 has come. `past`: the keys of
    meetings that are over for this process, kept from one to the next. `say` prints whom one waits
    for.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        size: int,
        patience: float,
        past: set[str] | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.store, self.rank, self.size = store, rank, size
        self.patience, self.say = patience, say
        self.past = set() if past is None else past
        self.key = ""  # of the meeting that this rank was in: all ranks of one start have the same

    def agree(self, subject: Subject, record: Any, whole: Callable[[], Any]) -> Answer:
        """Return the answer that all ranks get. `record` and what `whole` returns are JSON."""
        place = Place(self.store, subject.name)
        if self.rank != 0:
            answer = self._follower(place).agree(record, whole)
            self._leave(place, answer)
            return answer
        leader = self._leader(place)
        answer = leader.agree(subject, record, whole)
        self._leave(place, answer)
        if not answer.fine:
            leader.stay(pace.LEAVE)
        return answer

    def fail(self, name: str, sentence: str, wait: float) -> Answer | None:
        """Say that this rank failed; return the answer, None without one in `wait` s.

        Rank 0 answers at once.
        """
        place = Place(self.store, name)
        if self.rank != 0:
            answer = self._follower(place).fail(sentence, wait)
            if answer is not None:
                self._leave(place, answer)
            return answer
        leader = self._leader(place)
        answer = leader.answer(of_failures({0: sentence}))
        self._leave(place, answer)
        leader.stay(min(wait, pace.LEAVE))
        return answer

    def _leader(self, place: Place) -> Leader:
        return Leader(place, self.size, self.patience, self.say)

    def _follower(self, place: Place) -> Follower:
        return Follower(place, self.rank, self.patience, self.say, self.past)

    def _leave(self, place: Place, answer: Answer) -> None:
        """Remove this rank's keys after a fine meeting, the last rank all."""
        self.key = place.key
        if not place.key:
            return
        self.past.add(place.key)
        with suppress(RuntimeError, NotImplementedError):  # who keeps the store may be gone
            gone = place.add("gone", 1)
            if answer.fine:
                place.delete([f"rank/{self.rank}", f"whole/{self.rank}"])
            if answer.fine and gone == self.size:
                place.delete(["answer", "verdict", "came", "beat", "gone"])
