"""Every flag that is typed acts, or is refused before any work.

Numbers are finite, and of a size that something can be counted or drawn with.

A command's module may have a table NEEDS: which flags act only beside others. A flag that is typed
although it would do nothing is refused in one sentence, and so is a flag that is typed twice, of
which only the last would count. `cli.main` calls `check` for every command. `convert` asks its own
needs, some of which depend on what the source is, once it has looked.

A module whose flags may stand among those of another script adds its own in `add_flags`.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from types import ModuleType
from typing import Any, NamedTuple, NoReturn

from ep_plugin.errors import ConfigError, in_python
from ep_plugin.typed import LARGEST_FLOAT, LARGEST_INT
from ep_plugin.typed_words import WrongWord, number, one_of, sentence, unknown, whole
from ep_plugin.untrusted import one_line, shown

LARGEST_SEED = 2**63 - 1
LAST_COUNTS = ("convert",)  # commands whose scripts put flags behind others, which they replace


class Need(NamedTuple):
    """What some flags need in order to act."""

    flags: str  # separated by spaces
    met: Callable[[argparse.Namespace], bool]
    sentence: str  # what is wrong, and what to use; with {flag}, {args.NAME}


class Parser(argparse.ArgumentParser):
    """Refuses a command line in one line, whatever was typed; says so where help has no output."""

    def error(self, message: str) -> NoReturn:
        said = one_line(str(sentence(message)))
        self.exit(2, f"{self.prog}: error: {said}; see {self.prog} --help\n")

    def _get_value(self, action: argparse.Action, text: str) -> Any:
        try:
            if action.type is int:
                return whole(text, *_number_to_use(action, int))
            if action.type is float:
                return number(text, *_number_to_use(action, float))
        except WrongWord as wrong:
            raise argparse.ArgumentError(action, str(wrong)) from None
        return super()._get_value(action, text)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            if action.choices is not None:
                one_of(value, list(action.choices))
        except WrongWord as wrong:
            raise argparse.ArgumentError(action, str(wrong)) from None

    def _print_message(self, message: str, file: Any = None) -> None:
        (file or sys.stderr).write(message)  # argparse would hide that a disk is full


def _number_to_use(action: argparse.Action, kind: type[Any]) -> list[Any]:
    """Return the flag's default, where that is a number that says something."""
    return [action.default] if type(action.default) is kind and action.default else []


class _Counted(argparse.Namespace):
    """Counts how often each of `names` is set after it was made."""

    def __init__(self, **names: None) -> None:
        object.__setattr__(self, "times", Counter())
        super().__init__(**names)
        self.times.subtract(names.keys())

    def __setattr__(self, name: str, value: Any) -> None:
        self.times[name] += 1
        super().__setattr__(name, value)


def refuse_unknown(module: ModuleType, command: str, words: list[str]) -> NoReturn:
    """End with what to type instead of `words`, which the command does not know."""
    parser = Parser(f"ep-plugin {command}")
    module.add_arguments(parser)
    parser.error(unknown(words, parser._option_string_actions))


def check(module: ModuleType, args: argparse.Namespace, argv: list[str]) -> None:
    """Raise ConfigError for a flag in `argv` that would do nothing; `args` is `argv`, parsed."""
    for name, value in vars(args).items():
        for each in value if isinstance(value, list) else [value]:
            _check_number(name, each)
    times = _times_typed(module, argv)
    for name, count in times.items():
        if count > 1 and argv[0] not in LAST_COUNTS:
            raise ConfigError(f"{_flag(name)} is typed {count} times; use it once")
    refuse_idle(getattr(module, "NEEDS", ()), +times, args)


def _check_number(name: str, value: Any) -> None:
    """Raise ConfigError for a number that nothing here can count with."""
    limit: float = LARGEST_SEED if name.endswith("seed") else LARGEST_INT
    if type(value) is float:
        limit = LARGEST_FLOAT
    if type(value) in (int, float) and not abs(value) <= limit:  # nan is no number either
        raise ConfigError(
            f"{_flag(name)} must be a number up to {limit:.10g}; got {shown(value)}; use a smaller "
            "one"
        )


def refuse_idle(needs: Iterable[Need], typed: Collection[str], args: argparse.Namespace) -> None:
    """Raise ConfigError for a flag that was typed and would do nothing; `typed` has names in
    `args`."""
    for need in needs:
        for flag in need.flags.split():
            name = flag.removeprefix("--").replace("-", "_")
            if name in typed and not need.met(args):
                raise ConfigError(one_line(need.sentence.format(flag=flag, args=args)))


def words(spelling: dict[str, str]) -> Callable[[str, str | None], str]:
    """Return what spells a setting of a ConfigError as a command's own flag, where it has one."""

    def word(name: str, value: str | None) -> str:
        if name not in spelling:
            return in_python(name, value)
        return spelling[name] if value is None else f"{spelling[name]} {value}"

    return word


def _times_typed(module: ModuleType, argv: list[str]) -> Counter[str]:
    """Return how often each flag was typed, by its name in the namespace.

    Argparse fills in a default only where the namespace lacks a name. Here it has them all.
    """
    among_others = hasattr(module, "add_flags")
    parser = Parser(f"ep-plugin {argv[0]}", allow_abbrev=not among_others)
    (module.add_flags if among_others else module.add_arguments)(parser)
    names = vars(parser.parse_known_args(argv[1:])[0])
    counted = _Counted(**dict.fromkeys(names))
    parser.parse_known_args(argv[1:], counted)
    times: Counter[str] = counted.times
    return times


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
