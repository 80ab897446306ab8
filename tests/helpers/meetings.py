"""Ranks that compare, in threads over one store."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist
from flag_values import PLAIN, parser

from ep_plugin.megatron.arguments.parser import with_preset
from ep_plugin.megatron.ranks import model
from ep_plugin.megatron.ranks.answers import Answer
from ep_plugin.megatron.ranks.compared import Compared, of_arguments, subject
from ep_plugin.megatron.ranks.meeting import Meeting
from ep_plugin.megatron.ranks.sentence import Flags

PATIENCE = 20.0


def together(number: int, what: Callable[[int], Any]) -> list[Any]:
    """Return what `what(rank)` returns in a thread for each rank."""
    found: list[Any] = [None] * number

    def run(rank: int) -> None:
        found[rank] = what(rank)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    return found


def answer(
    compared: Sequence[Compared], stores: Sequence[Any] = (), flags: Flags | None = None
) -> Answer:
    """Return the answer that all ranks got, which is one; `stores` are one for each."""
    size = len(compared)
    places = stores or [dist.HashStore()] * size

    def rank_s(rank: int) -> Answer:
        one = compared[rank]
        about = subject("start", flags or Flags())
        return Meeting(places[rank], rank, size, PATIENCE).agree(about, one.record(), one.whole)

    answers = together(size, rank_s)
    assert len(set(answers)) == 1
    return answers[0]  # type: ignore[no-any-return]


def facts(**values: Any) -> Compared:
    return Compared({f"argument:{name}": str(value) for name, value in values.items()})


def parse(*flags: str) -> Any:
    args = parser().parse_args(with_preset([*PLAIN, *flags]))
    args.rank, args.local_rank = 0, 0
    return args


def of(args: Any, **more: Any) -> Compared:
    return of_arguments(args, getattr(args, "ep_typed", {}), more.pop("own", ()), 2)


def models(*held: model.Held) -> Answer:
    place = dist.HashStore()

    def rank_s(rank: int) -> Answer:
        part = Meeting(place, rank, len(held), PATIENCE)
        return part.agree(model.subject("model"), held[rank].record(), held[rank].whole)

    answers = together(len(held), rank_s)
    assert len(set(answers)) == 1
    return answers[0]  # type: ignore[no-any-return]


BASE = parse()
