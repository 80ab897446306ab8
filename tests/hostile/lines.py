"""Command lines with words of every kind: of `ep-plugin`, and the flags of a training run."""

import argparse
import random
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from tests.hostile import pickles, settings, texts

ALONE = ("plan", "presets", "law")  # commands that only compute: these are run, the others parsed
COMMANDS = (
    "apply",
    "audit",
    "bench",
    "convert",
    "doctor",
    "generate",
    "parity",
    "plan",
    "presets",
    "recipes",
    "report",
)
NOWHERE = Path(f"/nonexistent/{pickles.MARK}")


@cache
def actions(command: str) -> tuple[argparse.Action, ...]:
    """Return what the parser of a command takes."""
    parser = argparse.ArgumentParser()
    import_module(f"ep_plugin.commands.{command}").add_arguments(parser)
    return tuple(action for action in parser._actions if action.dest != "help")


def word(rng: random.Random) -> str:
    """Return one word that somebody may type."""
    number = rng.choice(settings.NUMBERS)
    choices = (
        str(number), rng.choice(settings.WORDS), rng.choice(texts.HTML),
        rng.choice(texts.shell(NOWHERE)),
        rng.choice(texts.paths(NOWHERE)), "1e3", "0x10", "1_000", "\u0664", " 4", "4 ", "+4",
        "nan", "1,2", "1:2",
    )  # fmt: skip
    return rng.choice(choices).replace("\0", "")  # which no shell can pass on


def _values(rng: random.Random, action: argparse.Action, odd: float) -> list[str]:
    if action.nargs == 0:
        return []
    many = rng.choice((1, 2, 3)) if action.nargs in ("+", "*") else 1
    if rng.random() < odd:
        return [word(rng) for _ in range(many)]
    if action.choices is not None:
        return [str(rng.choice(list(action.choices))) for _ in range(many)]
    if action.type is int:
        return [str(rng.choice((1, 2, 4, 8))) for _ in range(many)]
    if action.type is float:
        return [str(rng.choice((0.5, 1.0, 0.1))) for _ in range(many)]
    if action.type is Path:
        return [str(NOWHERE / rng.choice(("a", "b.json"))) for _ in range(many)]
    return [rng.choice((*settings.WORDS[:12], "mixtral-8x7b", "kernels")) for _ in range(many)]


def ours(rng: random.Random) -> list[str]:
    """Return a command line of `ep-plugin`."""
    command, odd = rng.choice(COMMANDS), rng.choice((0.0, 0.2, 0.6))
    argv = [command]
    for action in rng.sample(actions(command), rng.randint(0, min(8, len(actions(command))))):
        argv += [rng.choice(action.option_strings)] if action.option_strings else []
        argv += _values(rng, action, odd)
    for action in actions(command):
        if action.required and rng.random() < 0.7:
            argv += action.option_strings[:1] + _values(rng, action, odd)
    while rng.random() < 0.15:
        argv.insert(rng.randrange(len(argv)) + 1, word(rng))
    return argv


def _read(argv: list[str]) -> None:
    from ep_plugin.cli import build_parser
    from ep_plugin.commands import law

    selected = next((w for w in argv if not w.startswith("-")), None)
    args = build_parser(selected).parse_args(argv)
    module = import_module(f"ep_plugin.commands.{args.command}")
    law.check(module, args, argv[argv.index(args.command) :])
    if args.command == "convert":
        from ep_plugin.commands.convert.request import read_request

        read_request(args)
    elif args.command in ALONE and not getattr(args, "plot", None):
        module.run(args)


def learn() -> None:
    """Import what reading a line imports, before imports are watched."""
    for command in (*COMMANDS, "law"):
        import_module(f"ep_plugin.commands.{command}")
    _train([])
    import_module("ep_plugin.commands.convert.request")


@cache
def _rows() -> tuple[Any, ...]:
    from ep_plugin.megatron.arguments.table import TABLE

    return tuple(TABLE)


def training(rng: random.Random) -> list[str]:
    """Return flags of the plugin for a training run."""
    argv: list[str] = []
    for row in rng.sample(_rows(), rng.randint(1, 4)):
        argv.append(row.flag)
        if row.default is not False:
            legal = [str(value) for value in row.legal or ("1", "2", "0.5", "auto")]
            argv.append(rng.choice(legal) if rng.random() < 0.5 else word(rng))
    return argv


def _train(argv: list[str]) -> None:
    import command_line  # of tests/helpers

    from ep_plugin.errors import ConfigError

    found = command_line.read.__wrapped__(*argv)
    if isinstance(found, str):
        raise ConfigError(found)


def case(rng: random.Random) -> tuple[str, Callable[[], object]]:
    """Return a command line and what reads it."""
    if rng.random() < 0.4:
        argv = training(rng)
        return f"training {argv}", lambda: _train(argv)
    argv = ours(rng)
    return f"ep-plugin {argv}", lambda: _read(argv)
