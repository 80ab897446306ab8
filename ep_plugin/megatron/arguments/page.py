"""`python -m ep_plugin.megatron.arguments.page` prints `docs/flags.md`: the table of flags to read.

Imports neither torch nor Megatron.
"""

import re
from itertools import chain
from typing import get_args

from ep_plugin.errors import ConfigError
from ep_plugin.megatron.arguments.in_flags import in_flags
from ep_plugin.megatron.arguments.table import TABLE, Argument, Group, automatic
from ep_plugin.moe.rules import NEEDS, said
from ep_plugin.registry import available

INTRO = """# Flags

Every flag of the plugin. This page is printed from the table that the parser reads:
`python -m ep_plugin.megatron.arguments.page > docs/flags.md`.

A flag that you give with another value than its default acts, or is refused, or is idle by layout:

- It acts: the run is another one than without it. With its default it is as if it were not given.
- It is refused before anything is sent, in one sentence that says what to use instead.
- It is idle by layout: what concerns exchanges has nothing to do on one rank, and no skew fills a
  rank's capacity of the expert-parallel size or more. It is legal there, so that a laptop and a
  cluster share one command line, and one line at the start names it.

*Megatron's* is the flag of Megatron's with the same meaning, where the last one given wins, or one
that also sets it in other words. *Where refused, use* is what the refusal says to add, for some
values alone where they are named; an empty cell means that the flag acts by itself, with what its
line names. Without `--num-experts` a flag about experts is refused.
"""
HEAD = (
    "| flag | values | default | Megatron's | where refused, use | what it is |\n"
    "|---|---|---|---|---|---|"
)
_FLAG = re.compile(r"--[\w-]+(?: (?!with\b|alone\b)[\w.]+)?")  # and its value
TYPES = {"int": "a whole number", "float": "a number"}
VALUES = {  # of flags that are read in a way of their own
    "preset": "a name",
    "teacher": "a folder",
    "teacher_layout": "`tp=T,ep=E`",
    "distill_temperature": "a number above 0",
    "distill_weight": "a number above 0",
    "distill_stop": "above 0, up to 1",
    "audit_save": "no value",
    "experts_per_layer": "`N*LAYERS,...`",
    "further_losses": "`SCOPE:COEFF,...`",
}


def page() -> str:
    """Return the page."""
    parts = [INTRO]
    for group in get_args(Group):
        rows = [_line(row) for row in TABLE if row.group == group]
        parts.append("\n".join([f"## {group}\n", HEAD, *rows, ""]))
    return "\n".join(parts)


def _line(row: Argument) -> str:
    cells = (f"`{row.flag}`", _values(row), _default(row), _theirs(row), _needs(row))
    return f"| {' | '.join((*cells, row.help))} |"


def _values(row: Argument) -> str:
    if row.name in VALUES:
        return VALUES[row.name]
    if row.kind is not None:
        names = (*automatic(row.kind), *available(row.kind))
        return f"{_quoted(names)}, a module of yours"
    if row.hint is bool:
        return _quoted(("on", "off"))
    return _quoted(row.legal) if row.legal is not None else TYPES[row.hint.__name__]


def _quoted(names: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _default(row: Argument) -> str:
    return "" if row.field_default in (None, ()) else f"`{said(row.field_default)}`"


def _theirs(row: Argument) -> str:
    if row.twin_flag is not None:
        return f"`{row.twin_flag}`"
    return "" if row.cousin is None else f"set by `{row.cousin}`"


def _needs(row: Argument) -> str:
    """Return what the refusals say to use, but for another value of the flag itself."""
    feeds = row.feeds or ""
    sentences = [(need.sentence, need.values) for need in NEEDS.get(feeds, ())]
    sentences += [(need.sentence, need.values) for need in row.needs]
    found = [
        f"{_quoted(tuple(map(said, values)))}: {way}" if values else way
        for sentence, values in sentences
        if (way := _way_out(row, ConfigError(sentence).spelled(in_flags(()))))
    ]
    if row.idle_at_one_rank:
        found.append("idle on one rank")
    if row.name == "rank_capacity":
        found.append("idle from the expert-parallel size on")
    return "; ".join(found)


def _way_out(row: Argument, sentence: str) -> str:
    own = (row.flag, row.usual_flag)
    _, use, rest = sentence.partition("; use ")
    kept = [
        way
        for way in chain.from_iterable(part.split(" or ") for part in rest.split(", or "))
        if use and not any(f"{flag} " in f"{way} " for flag in own)
    ]
    return _FLAG.sub(r"`\g<0>`", " or ".join(kept))


if __name__ == "__main__":
    print(page(), end="")
