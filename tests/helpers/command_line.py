"""Command lines as Megatron and the plugin read them, and what refusals say to type beside them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest.mock import patch

from flag_values import PLAIN, given, parser

from ep_plugin.errors import ConfigError
from ep_plugin.megatron.arguments import checks, speed
from ep_plugin.megatron.arguments.in_flags import in_flags
from ep_plugin.megatron.arguments.parser import with_preset
from ep_plugin.megatron.arguments.resume import choose_format
from ep_plugin.megatron.arguments.table import BY_NAME
from ep_plugin.megatron.edge_settings import EdgeSettings
from ep_plugin.megatron.settings import moe_config, ranks_per_node
from ep_plugin.moe.config import MoEConfig


@dataclass
class Accepted:
    """A command line that was taken."""

    args: Any
    settings: EdgeSettings
    config: MoEConfig
    said: tuple[str, ...]  # lines for the log


@cache
def read(*flags: str) -> Accepted | str:
    """Return what a command line means, or the sentence with which it is refused."""
    args = parser().parse_args(with_preset([*PLAIN, *flags]))
    args.world_size = 2
    typed = {flag: name for flag, name in checks.take_typed(args).items() if flag in flags}
    try:
        checks.check_typed(args, typed)
        # packages of options may not be here
        with patch.object(checks, "resolve"), patch.object(speed, "resolve"):
            said = speed.take_speed(args, typed)
            settings = checks.settings_from_args(args)
        checks.check_arguments(args, settings)
        config = moe_config(args, settings, 1)
        ranks_per_node(settings)
    except ConfigError as error:
        return error.spelled(in_flags(typed))
    choose_format(args)
    return Accepted(args, settings, config, tuple(said))


WORD = re.compile(r"(?P<no>no )?(?P<flag>--[\w-]+)(?: (?P<value>'[^']*'|[^\s;-][^\s;]*))?")


def ways_out(sentence: str) -> Iterator[list[str]]:
    """Yield the flags that a refusal says to use, alternative by alternative."""
    for alternative in re.split(r", or | or |, ", sentence.rpartition("; use ")[2]):
        flags: list[str] = []
        for word in WORD.finditer(alternative.replace(" with ", " ; ").replace(" and ", " ; ")):
            if not word["no"]:
                flags += [word["flag"], *([word["value"].strip("',")] if word["value"] else [])]
        if flags:
            yield flags


def completed(name: str, value: Any, depth: int = 3, beside: tuple[str, ...] = ()) -> list[str]:
    """Return the flags that the refusals say to use beside this one; [] where none is needed.

    A refusal without a way out that works and keeps what was typed is an AssertionError.
    """
    typed = given(name, value)
    found = read(*typed, *beside)
    if isinstance(found, Accepted):
        return list(beside)
    assert re.match(rf"({'|'.join(filter(None, names_of(name)))})\b", found) or beside, found
    assert depth, f"no end of refusals: {found}"
    for flags in ways_out(found):
        if typed[0] in flags:
            continue  # another value instead
        try:
            return completed(name, value, depth - 1, (*beside, *flags))
        except (AssertionError, SystemExit):
            continue
    raise AssertionError(f"{' '.join(typed)} {' '.join(beside)}: no way out works: {found}")


def names_of(name: str) -> tuple[str | None, ...]:
    row = BY_NAME[name]
    return row.flag, row.twin_flag, row.cousin
