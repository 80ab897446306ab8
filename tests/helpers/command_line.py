"""What the plugin makes of a command line, up to what needs more than its arguments."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest.mock import patch

from flag_values import PLAIN, parser

from ep_plugin.errors import ConfigError
from ep_plugin.megatron.arguments import checks, speed
from ep_plugin.megatron.arguments.in_flags import in_flags
from ep_plugin.megatron.arguments.parser import with_preset
from ep_plugin.megatron.arguments.resume import choose_format
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
