"""Two figures of a peer: as its users get it, and the best with its switches."""

from collections.abc import Iterable
from itertools import groupby

from ep_plugin.commands.bench.contest import DROPPING
from ep_plugin.commands.bench.figures import Row, case_of

PEER, AS_IS, SWITCHED = "megatron", "defaults", "cutlass"


def both_figures(rows: Iterable[Row]) -> list[str]:
    """Return a line for each case and precision in which Megatron's layer was measured.

    Rows that drop tokens are another layer's and take no part.
    """
    mine = [
        row
        for row in rows
        if row["bench"] in ("layer", "overlap") and _is_peer(row) and row["device"] != "cpu"
    ]

    def case(row: Row) -> tuple[str, ...]:
        return row["bench"], case_of(row), row["precision"], row["device"]

    return [
        f"{bench} {where}, {device}: {_line(list(members), precision)}"
        for (bench, where, precision, device), members in groupby(sorted(mine, key=case), case)
    ]


def _is_peer(row: Row) -> bool:
    name, *ways = row["backend"].split("+")
    return bool(name == PEER) and DROPPING not in ways


def _line(rows: list[Row], precision: str) -> str:
    as_is = [row for row in rows if _is_as_is(row["backend"].split("+"))]
    best = min(rows, key=lambda row: float(row["ms"]))
    plain = min(as_is, key=lambda row: float(row["ms"]), default=None)
    told = "not measured" if plain is None else _figure(plain)
    return f"Megatron {precision} as its users get it {told}; at its best {_figure(best)}"


def _is_as_is(ways: list[str]) -> bool:
    return AS_IS in ways and SWITCHED not in ways


def _figure(row: Row) -> str:
    switches = row.get("switches")
    return f"{row['ms']:.2f} ms ({switches or row['backend']})"
