"""Differences between ranks as one sentence: each setting as typed, its values, the ranks."""

from argparse import ArgumentParser
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ep_plugin.megatron.ranks.answers import ranges
from ep_plugin.megatron.ranks.contents import UNKNOWN

LIMIT = 6  # differences that are named
VALUES = 4  # values of one setting that are named
_WIDTH = 60  # characters of a value
# What differs -> what to do.
REMEDIES = {
    "argument": "start every rank with the same command line",
    "setting": "call install() with the same settings on every rank",
    "group": "call initialize_model_parallel with the same sizes on every rank",
    "version": "install the same versions on every host",
    "files": "use the same files on every host",
    "switch": "let every rank's script set torch alike",
    "variable": "export the same environment variables on every host",
    "content": "let every host read the same files",
    "together": "name the same folder on all ranks of a host",
    "size": "start as many ranks as WORLD_SIZE says on each",
    "config": "let every rank build its model with the same settings",
}


@dataclass(frozen=True)
class Flags:
    """How arguments are typed: by argument its first flag, and by flag how it is read."""

    first: Mapping[str, str] = field(default_factory=dict)
    switch: Mapping[str, Any] = field(default_factory=dict)  # flag without a value -> what it sets


def flags_of(parser: ArgumentParser | None) -> Flags:
    """Return the flags of a parser."""
    first: dict[str, str] = {}
    switch: dict[str, Any] = {}
    for action in parser._actions if parser is not None else ():
        for flag in action.option_strings:
            if flag.startswith("--"):
                first.setdefault(action.dest, flag)
                if action.nargs == 0:
                    switch[flag] = action.const
    return Flags(first, switch)


@dataclass(frozen=True)
class Difference:
    """One fact that ranks have otherwise: `kind`, name, and the ranks of each value as text."""

    kind: str
    name: str
    values: Mapping[str | None, Sequence[int]]  # None: a rank does not have it at all


def differences(facts: Iterable[tuple[Sequence[int], Mapping[str, str]]]) -> list[Difference]:
    """Return what differs between kinds of ranks, each with its facts: "kind:name" -> text."""
    kinds = list(facts)
    names = dict.fromkeys(name for _, found in kinds for name in found)
    result = []
    for name in names:
        values: dict[str | None, list[int]] = {}
        for ranks, found in kinds:
            if found.get(name) != UNKNOWN:
                values.setdefault(found.get(name), []).extend(ranks)
        if len(values) > 1:
            kind, _, rest = name.partition(":")
            ordered = dict(sorted(values.items(), key=lambda pair: min(pair[1])))
            result.append(Difference(kind, rest, ordered))
    return result


def sentence(found: Sequence[Difference], flags: Flags, typed: Mapping[str, str]) -> str:
    """Return what differs and what to do; `typed` are flags that some rank had: argument -> flag.

    Where a typed one differs, those that were not typed follow from it and are only counted.
    """
    typed_ones = [d for d in found if d.kind != "argument" or d.name in typed]
    named = typed_ones or list(found)
    following = len(found) - len(named)
    parts = [said(difference, flags, typed) for difference in named[:LIMIT]]
    if len(named) > LIMIT:
        parts.append(f"and {len(named) - LIMIT} more")
    if following:
        parts.append(f"{following} more that follow from these")
    remedies = dict.fromkeys(REMEDIES[difference.kind] for difference in named)
    return f"the ranks must be alike in {'; '.join(parts)}; {', and '.join(remedies)}"


def said(difference: Difference, flags: Flags, typed: Mapping[str, str]) -> str:
    """Return one difference: its name, and which ranks have which value."""
    word = _word(difference, flags, typed)
    texts = {value: _text(value, word) for value in difference.values}
    if len(set(texts.values())) < len(texts):  # they differ behind what is shown
        texts = {value: f"{text} [{n}]" for n, (value, text) in enumerate(texts.items(), start=1)}
    shown = list(difference.values.items())[:VALUES]
    if word in flags.switch:  # those that have it first
        shown.sort(key=lambda pair: pair[0] != repr(flags.switch[word]))
    parts = []
    for value, ranks in shown:
        one = len(ranks) == 1
        what = f"{'has' if one else 'have'} {texts[value]}"
        if word in flags.switch and value in ("True", "False", None):
            does = "has it" if one else "have it"
            does_not = "does not" if one else "do not"
            what = does if value == repr(flags.switch[word]) else does_not
        parts.append(f"{'rank' if one else 'ranks'} {ranges(ranks)} {what}")
    rest = len(difference.values) - VALUES
    if rest > 0:
        parts.append(f"others have {rest} other values")
    return f"{word} ({', '.join(parts)})"


def _word(difference: Difference, flags: Flags, typed: Mapping[str, str]) -> str:
    name = difference.name
    flag = typed.get(name) or flags.first.get(name)
    if difference.kind == "content":
        what = "the checkpoint of" if name.endswith(("load", "checkpoint", "ckpt_dir")) else "what"
        tail = "" if what == "the checkpoint of" else " names"
        return f"{what} {flag or name}{tail}"
    if difference.kind in ("argument", "together"):
        return flag or f"args.{name}"
    if difference.kind == "version":
        return f"the version of {name}"
    return name


def _text(value: str | None, word: str) -> str:
    if value is None:
        return "nothing"
    if value in ("True", "False") and word.startswith("--ep-"):
        return "on" if value == "True" else "off"
    plain = "none" if value == "None" else value.strip("'\"")
    return plain if len(plain) <= _WIDTH else f"{plain[: _WIDTH - 3]}..."
