"""The `--ep-*` flags of `table.py`, in Megatron's parser.

A field that Megatron has a flag for shares its destination: `--ep-topk` and `--moe-router-topk` are
two names of one argument, and the last one on the command line wins. The others are ours alone and
None when not given.
"""

import argparse
import re
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn, get_args

from ep_plugin.checkpoint.scopes import SCOPES
from ep_plugin.errors import ConfigError
from ep_plugin.megatron.arguments.table import TABLE, TYPED, Argument, Group, automatic
from ep_plugin.megatron.distill.teacher_layout import parse_layout
from ep_plugin.registry import available
from ep_plugin.typed import LARGEST_FLOAT
from ep_plugin.typed_words import WrongWord, number, one_of, sentence, unknown, whole
from ep_plugin.untrusted import shown

_OURS = re.compile(r"(argument|ambiguous option:|unrecognized arguments:) --ep-")
MOST_LAYERS = 1 << 16  # of a pyramid, each of which is an entry of a list


def on_off(text: str) -> bool:
    """Read `on` or `off`."""
    return one_of(text, ("on", "off")) == "on"


def experts_per_layer(text: str) -> tuple[int, ...]:
    """Read "32*10,64*2": one number of experts for each MoE layer, first to last."""
    try:
        runs = [part.partition("*") for part in text.split(",")]
        if sum(int(times) for _, star, times in runs if star) > MOST_LAYERS:
            raise ValueError
        counts = tuple(int(n) for n, star, times in runs for _ in range(int(times) if star else 1))
    except ValueError as error:
        raise WrongWord(
            f"must be numbers of experts for layers; got {shown(text)}; use 32*10,64*2"
        ) from error
    if not counts or min(counts) < 1:
        raise WrongWord(f"must name at least 1 expert a layer; got {shown(text)}; use 32*10,64*2")
    return counts


def seconds(text: str) -> int:
    """Read a whole number of seconds, 0 or more."""
    if not text.isdecimal():
        raise WrongWord(f"must be whole seconds, or 0; got {shown(text)}; use 20")
    return int(text)


def layout(text: str) -> str:
    """Read "tp=2,ep=2": parallel sizes of a teacher; kept as it is typed."""
    try:
        parse_layout(text)
    except ValueError as error:
        raise WrongWord(f"must be parallel sizes; got {shown(text)}; use tp=2,ep=2") from error
    return text


def positive(text: str) -> float:
    """Read a finite number above 0."""
    value = number(text, 1.0)
    if not 0 < value < LARGEST_FLOAT:
        raise WrongWord(f"must be a number above 0; got {shown(text)}; use 1")
    return value


def part(text: str) -> float:
    """Read a part of a run: above 0 and up to 1."""
    value = positive(text)
    if value > 1:
        raise WrongWord(f"must be above 0 and at most 1; got {shown(text)}; use 1")
    return value


def _scope(text: str) -> str:
    if text not in SCOPES:
        raise ValueError(text)
    return text


def further_losses(text: str) -> tuple[tuple[str, float], ...]:
    """Read "sequence:1e-3,global:1e-4": scope and coefficient of each loss."""
    try:
        pairs = [part.split(":") for part in text.split(",")]
        return tuple((_scope(scope), float(share)) for scope, share in pairs)
    except ValueError as error:
        raise WrongWord(
            f"must be scopes and coefficients; got {shown(text)}; use sequence:1e-3,global:1e-4"
        ) from error


# Rows that are read in a way of their own: flag -> (read, what stands for the value in --help)
READERS: dict[str, tuple[Callable[[str], Any], str]] = {
    "--ep-experts-per-layer": (experts_per_layer, "N*LAYERS,..."),
    "--ep-further-losses": (further_losses, "SCOPE:COEFF,..."),
    "--ep-preset": (str, "NAME"),
    "--ep-watch-ranks": (seconds, "SECONDS"),
    "--ep-teacher": (str, "CKPT"),
    "--ep-teacher-layout": (layout, "tp=T,ep=E"),
    "--ep-distill-temperature": (positive, "T"),
    "--ep-distill-weight": (positive, "W"),
    "--ep-distill-stop": (part, "PART"),
}


def add_ep_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the plugin's flags in groups of their own, and make `--ep-preset` work."""
    groups = {name: parser.add_argument_group(f"ep_plugin: {name}") for name in get_args(Group)}
    for row in TABLE:
        groups[row.group].add_argument(row.flag, **_settings(row))
    parser.add_argument("--ep-parity-dump", metavar="FOLDER", help=argparse.SUPPRESS)
    _note_what_is_typed(parser)
    _refuse_ours_in_one_sentence(parser)
    return parser


def help_of(row: Argument) -> str:
    """Return the row's line of help: what it is, its twin of Megatron's, its default."""
    if row.kind is not None:
        names = ", ".join((*automatic(row.kind), *available(row.kind)))
        return f"{row.help}: {names}, or a module of your own; default {row.default}"
    text = row.help
    if row.twin_flag is not None:
        text += f"; the same as {row.twin_flag}"
    elif row.field_default is not None and "default" not in text:
        default = {True: "on", False: "off"}.get(row.field_default, row.field_default)
        text += f"; default {default}"
    return text


def _settings(row: Argument) -> dict[str, Any]:
    """Return what `add_argument` is told of a row."""
    found: dict[str, Any] = {"help": help_of(row), "default": row.default, "dest": row.dest}
    if row.twin is not None:
        found["default"] = argparse.SUPPRESS
    if row.flag in READERS:
        read, metavar = READERS[row.flag]
        return found | {"type": read, "metavar": metavar}
    if row.default is False:
        return found | {"action": "store_true"}
    if row.hint is bool:
        return found | {"type": on_off, "metavar": "{on,off}"}
    if row.legal is not None:
        names = f"{{{','.join(row.legal)}}}"
        return found | {"type": partial(one_of, legal=row.legal), "metavar": names}
    numbers: dict[Any, Callable[..., Any]] = {int: whole, float: number}
    if row.hint not in numbers:
        return found | {"type": row.hint}
    use = {"use": row.field_default} if row.field_default else {}
    return found | {"type": partial(numbers[row.hint], **use)}


def _note_what_is_typed(parser: argparse.ArgumentParser) -> None:
    """Note the flags that are given, and put the arguments of `--ep-preset NAME` before them."""
    original = parser.parse_known_args

    def parse_known_args(args: Any = None, namespace: Any = None) -> Any:
        words = sys.argv[1:] if args is None else list(args)
        parsed, rest = original(with_preset(words), namespace)
        known = parser._option_string_actions
        dests = {flag: known[flag].dest for flag in typed_in(words) if flag in known}
        setattr(parsed, TYPED, dests)
        return parsed, rest

    parser.parse_known_args = parse_known_args  # type: ignore[method-assign]


def _refuse_ours_in_one_sentence(parser: argparse.ArgumentParser) -> None:
    """Refuse a wrong flag of ours once for all ranks; of Megatron's flags argparse says the rest.

    It would print the usage, which is pages long, on every rank.
    """
    from ep_plugin.megatron.seams.refusal import refuse

    original = parser.error

    def error(message: str) -> NoReturn:
        if _OURS.match(message):
            rest = message.removeprefix("unrecognized arguments: ")
            if rest != message:
                message = unknown(rest.split(), parser._option_string_actions)
            refuse(sentence(message))
        original(message)

    parser.error = error  # type: ignore[method-assign]


def typed_in(words: list[str]) -> frozenset[str]:
    """Return the flags on a command line."""
    return frozenset(word.partition("=")[0] for word in words if word.startswith("--"))


def with_preset(arguments: list[str]) -> list[str]:
    """Return `arguments` behind those of the preset they name; exits for an unknown name."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--ep-preset")
    _refuse_ours_in_one_sentence(finder)
    name = finder.parse_known_args(arguments)[0].ep_preset
    if name is None:
        return arguments
    from ep_plugin.megatron.arguments.spell import megatron_arguments
    from ep_plugin.megatron.arguments.together import unless_typed
    from ep_plugin.megatron.seams.refusal import refuse
    from ep_plugin.presets import load

    try:
        preset = megatron_arguments(load(name))
    except ConfigError as error:
        refuse(error)
    return [*unless_typed(preset, typed_in(arguments)), *arguments]
