"""How long ranks wait before they say for whom, beside the timeouts that end their processes.

Imports neither torch nor Megatron.
"""

import math
from collections.abc import Iterator
from typing import Any

from ep_plugin.errors import ConfigError
from ep_plugin.megatron.arguments.table import BY_NAME

ROW = BY_NAME["watch_ranks"]
TIMEOUTS = {  # Megatron's flags -> seconds of one of their units
    "--distributed-timeout-minutes": 60,
    "--distributed-timeout-seconds-after-init": 1,  # from the second iteration on
}


def room(args: Any) -> float:
    """Return three quarters of the shorter timeout, in seconds: what is said later may be lost."""
    return min(0.75 * unit * value for _, unit, value in _given(args))


def watch(args: Any) -> str | None:
    """Return the line on a default that is longer than the timeouts allow, None where it is not.

    Raises ConfigError for another value that is.
    """
    seconds = args.ep_watch_ranks
    if args.num_experts is None:
        return None
    for flag, unit, value in _given(args):
        if seconds <= 0.75 * unit * value:
            continue
        longer, shorter = math.ceil(seconds / (0.75 * unit)), math.floor(room(args))
        why = (
            f"longer than three quarters of {flag} ({value}), after which the process is ended and "
            f"says nothing; use {flag} {longer} beside it"
        )
        why += f", or {ROW.flag} {shorter}" if shorter else ""
        if seconds == ROW.default:
            return f"{ROW.flag} is {seconds} where it is not given, {why}"
        raise ConfigError(f"{ROW.flag} ({seconds}) is {why}")
    return None


def _given(args: Any) -> Iterator[tuple[str, int, int]]:
    for flag, unit in TIMEOUTS.items():
        value = getattr(args, flag.removeprefix("--").replace("-", "_"), None)
        if value is not None:
            yield flag, unit, value
