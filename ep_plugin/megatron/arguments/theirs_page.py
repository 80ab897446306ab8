"""`python -m ep_plugin.megatron.arguments.theirs_page` prints `docs/megatron-flags.md`.

Imports neither torch nor Megatron.
"""

import re

from ep_plugin.megatron.arguments.table import TABLE
from ep_plugin.megatron.arguments.theirs import BESIDE, choices
from ep_plugin.megatron.arguments.theirs_releases import FLAGS, RELEASES
from ep_plugin.megatron.arguments.theirs_table import THEIRS, Theirs

INTRO = """# Megatron's flags

What becomes of each of Megatron's own settings that could concern an MoE layer, on megatron-core
0.16 to 0.19. This page is printed from the table that the checks read:
`python -m ep_plugin.megatron.arguments.theirs_page > docs/megatron-flags.md`.

A refusal comes before anything is sent, in one sentence that says what to write instead. *Releases*
is empty where all four have the setting. A name without dashes is a field of `TransformerConfig`
without a flag. Ours are in [flags.md](flags.md).
"""
ACTS = """## Served

Our block, or Megatron around it, does what it says, but for these: `--moe-expert-capacity-factor`
drops in training alone ([routing](routing.md)), the experts' FP8 is in recipes of ours
([FP8](fp8.md)), and of `--moe-flex-dispatcher-backend` hybridep and ncclep become `auto`. *Ours* is
the flag of ours that means the same, or that stands for it.

| flag | releases | values | ours | where it is refused: it ... |
|---|---|---|---|---|
"""
IDLE = """
## Without effect

They name how Megatron's own MoE layer works inside; results stay what was asked for. One line at
the start names those that were typed.

| flag | releases | why |
|---|---|---|
"""
REFUSED = """
## Refused

| flag | releases | why, and what to write instead |
|---|---|---|
"""
OUTSIDE = """
## About other parts

Our block neither has nor reads what they are about; Megatron does with them what it always does.

| about | flags |
|---|---|
"""
STANDS_FOR = {  # of Megatron's -> ours, where neither is another name of the other
    "moe_token_dispatcher_type": "--ep-dispatcher",
    "moe_flex_dispatcher_backend": "--ep-dispatcher",
    "moe_enable_deepep": "--ep-dispatcher",
    "moe_shared_expert_overlap": "--ep-overlap",
    "overlap_moe_expert_parallel_comm": "--ep-overlap",
    "fp8": "--ep-fp8",
}


def page() -> str:
    """Return the page."""
    acts = [_cells(row, _values(row), _ours(row), _when(row)) for row in _rows("acts")]
    idle = [_cells(row, _quoted(row.why)) for row in _rows("no effect")]
    refused = [_cells(row, _quoted(row.why)) for row in _rows("refused")]
    outside: dict[str, list[str]] = {}
    for row in _rows("outside"):
        outside.setdefault(row.why.removeprefix("is about "), []).append(_name(row))
    others = [f"| {about} | {', '.join(names)} |" for about, names in outside.items()]
    parts = ((ACTS, acts), (IDLE, idle), (REFUSED, refused), (OUTSIDE, others))
    return INTRO + "\n" + "".join(head + "\n".join(lines) + "\n" for head, lines in parts)


def _rows(effect: str) -> list[Theirs]:
    return [row for row in THEIRS if row.effect == effect]


def _cells(row: Theirs, *cells: str) -> str:
    return f"| {' | '.join((_name(row), RELEASES.get(row.field, ''), *cells))} |"


def _name(row: Theirs) -> str:
    return ", ".join(f"`{name}`" for name in FLAGS.get(row.field, (row.name,)))


def _values(row: Theirs) -> str:
    return ", ".join(f"`{value}`" for value in row.legal) or "all"


def _ours(row: Theirs) -> str:
    flags = [
        ours.flag
        for ours in TABLE
        if row.field in (ours.twin, (ours.cousin or "").removeprefix("--").replace("-", "_"))
    ]
    flags += [STANDS_FOR[row.field]] if row.field in STANDS_FOR else []
    return ", ".join(f"`{flag}`" for flag in flags)


def _when(row: Theirs) -> str:
    """Return what follows the flag in the sentences that refuse it, for other values or beside."""
    found = []
    if row.legal:
        way = "" if "; " in row.why else f"; use {choices(row)}"
        found.append(f"another value: {row.why}{way}")
    found += [sentence for field, _, sentence in BESIDE if field == row.field]
    return _quoted("; or: ".join(found))


def _quoted(text: str) -> str:
    return re.sub(r"--[\w-]+", r"`\g<0>`", text)


if __name__ == "__main__":
    print(page(), end="")
