"""One sentence about ranks: which of them the others wait for, and where. Standard library only."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from ep_plugin.moe.watch.place import Seen, State

AT_MOST = 3  # ranks, or groups of them, that are told one by one
# The first are to blame before the later ones.
DIED, FAILED, STOPPED, SILENT, ENDED = "died", "failed", "is stopped", "silent", "ended"
UNREACHED = "unreached"  # it said that it can say no more


@dataclass(frozen=True)
class Known:
    """What one rank knows of another, or of itself."""

    rank: int
    host: str
    pid: int
    seen: Seen | None  # None: nothing was ever heard
    fault: str | None = None
    seconds: float = 0.0  # without a move; of a silent rank, without a word
    why: str = ""  # of one that can say no more


def fault_of(seen: Seen) -> str | None:
    """Return what a rank itself says is wrong with it."""
    return {State.FAILED: FAILED, State.ENDED: ENDED}.get(seen.state)


def to_blame(ranks: Iterable[Known]) -> list[Known]:
    """Return the ranks that the others wait for; none if all are alive and as far as each other."""
    ranks = list(ranks)
    faulty = [known for known in ranks if known.fault not in (None, ENDED, UNREACHED)]
    if faulty:
        return faulty
    ended = [k for k in ranks if k.fault == ENDED and k.seen is not None and not k.seen.finished]
    behind = ended or [known for known in ranks if _is_behind(known, ranks)]
    return [*behind, *(known for known in ranks if known.fault == UNREACHED)]


def sentence(ranks: Sequence[Known]) -> str:
    """Return who is waited for, and by whom."""
    blamed = to_blame(ranks)
    waiting = [known for known in ranks if known not in blamed and known.seen is not None]
    if not blamed:
        return f"no rank is behind another: {_groups(waiting, 'is', 'are')}"
    told = [_tell(known) for known in blamed[:AT_MOST]]
    if len(blamed) > AT_MOST:
        told.append(f"and so of {len(blamed) - AT_MOST} further ranks")
    it = "it" if len(blamed) == 1 else "them"
    if waiting:
        told.append(_groups(waiting, f"waits for {it}", f"wait for {it}"))
    return "; ".join(told)


def slow_work(ranks: Sequence[Known]) -> bool:
    """Whether all ranks are alive and in the same work that may take long, such as a save."""
    first = ranks[0].seen
    return first is not None and all(
        known.fault is None
        and known.seen is not None
        and known.seen.is_long
        and known.seen.where == first.where
        for known in ranks
    )


def slow_sentence(ranks: Sequence[Known]) -> str:
    """Return where all ranks are, as `slow_work` found them."""
    return f"that is slow, and no sign of a fault: {_groups(list(ranks), 'is', 'are')}, and alive"


def spans(numbers: Iterable[int]) -> str:
    """Return `0-2, 5` for 0, 1, 2, 5."""
    runs = groupby(enumerate(sorted(numbers)), key=lambda pair: pair[1] - pair[0])
    ends = [[number for _, number in run] for _, run in runs]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in ends)


def _is_behind(known: Known, ranks: list[Known]) -> bool:
    """Whether a rank is behind others that run the same layers."""
    if known.seen is None:
        return False
    own = known.seen
    alike = [r.seen for r in ranks if r.seen is not None and r.seen.family == own.family]
    return any(_progress(own) < _progress(other) for other in alike) and all(
        _progress(own) <= _progress(other) for other in alike
    )


def _progress(seen: Seen) -> tuple[int, int]:
    return seen.iteration, seen.layer_moves


def _tell(known: Known) -> str:
    name = f"rank {known.rank} ({known.host}, pid {known.pid})"
    if known.fault == UNREACHED:
        return (
            f"where {name} is, is not known: it got no connection of its own to the rendezvous "
            f"store ({known.why})"
        )
    if known.seen is None:
        return f"rank {known.rank} has never been heard of"
    where, seconds = _where(known.seen), f"{known.seconds:.0f} s"
    if known.fault == SILENT:
        return f"{name} has not been heard of for {seconds}; it was last {where}"
    if known.fault is None:
        return f"{name} has been {where} for {seconds}"
    if known.fault == FAILED:
        return f"{name} failed with {known.seen.why} {where}; its own error says why"
    verb = {ENDED: "has ended"}.get(known.fault, known.fault)
    return f"{name} {verb}; it was last {where}"


def _where(seen: Seen) -> str:
    return f"{seen.where}, iteration {seen.iteration}" if seen.iteration else seen.where


def _groups(ranks: list[Known], one: str, several: str) -> str:
    places: dict[str, list[int]] = {}
    for known in ranks:
        assert known.seen is not None
        places.setdefault(_where(known.seen), []).append(known.rank)
    largest = sorted(places.items(), key=lambda item: -len(item[1]))
    told = []
    for number, (where, members) in enumerate(largest[:AT_MOST]):
        many = len(members) > 1
        verb = "" if number else f"{several if many else one} "
        told.append(f"rank{'s' if many else ''} {spans(members)} {verb}{where}")
    if len(largest) > AT_MOST:
        told.append(f"{sum(len(m) for _, m in largest[AT_MOST:])} further ranks elsewhere")
    return ", ".join(told)
