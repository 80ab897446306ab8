"""What a meeting is about, what it comes to, and the sentences for that."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Answer:
    """What a meeting came to: fine, or the sentence that ends every rank."""

    fine: bool
    text: str = ""  # the sentence; of a fine meeting, what rank 0 may print
    failed: tuple[int, ...] = ()  # ranks that said themselves what is wrong

    def as_json(self) -> dict[str, Any]:
        return {"fine": self.fine, "text": self.text, "failed": self.failed}


@dataclass(frozen=True)
class Subject:
    """What a meeting is about.

    `judge` gets every rank's record and returns the ranks to ask for the whole of what they have;
    none: all is well. `decide` gets that of these ranks, and returns the answer.
    """

    name: str
    judge: Callable[[Sequence[Any]], Collection[int]]
    decide: Callable[[Sequence[Any], dict[int, Any]], Answer]


def of_json(found: Mapping[str, Any]) -> Answer:
    return Answer(found["fine"], found["text"], tuple(found["failed"]))


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


def named(ranks: Sequence[int]) -> str:
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {ranges(ranks)}"


def left(ranks: Sequence[int]) -> Answer:
    return Answer(
        False,
        f"{named(ranks)} ended while the ranks compared their settings; the output there says why",
    )


def not_there(ranks: Sequence[int], patience: float, before: str = "") -> Answer:
    """Return the answer on ranks that did not come; `before` is known of an earlier start."""
    who = named(ranks)
    return Answer(
        False,
        f"{who} did not come within {patience:.0f} s of the last rank that did; "
        f"the output of {who} says why; where ranks start more slowly, "
        f"EP_PLUGIN_START_TIMEOUT=3600 waits for that many seconds{before}",
    )


def waits_for(ranks: Sequence[int], patience: float, before: str = "") -> str:
    last = f"for up to {patience:.0f} s after the last that came"
    return f"waiting for {named(ranks)}, {last}{before}"


def of_failures(failures: Mapping[int, str]) -> Answer:
    """Say which ranks failed, and why; ranks of one reason together."""
    why: dict[str, list[int]] = {}
    for rank, sentence in failures.items():
        why.setdefault(sentence, []).append(rank)
    parts = [
        f"{named(ranks)} failed at the start: {sentence}"
        for sentence, ranks in list(why.items())[:3]
    ]
    return Answer(False, "; ".join(parts), tuple(failures))
