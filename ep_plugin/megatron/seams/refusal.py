"""How a user's mistake ends a run: one sentence, once, and exit code 2 on every rank."""

import os
import sys
from typing import NoReturn

from ep_plugin.errors import ConfigError
from ep_plugin.megatron.seams.for_torchrun import leave_for_torchrun


def refuse(error: ConfigError) -> NoReturn:
    """Print the error once for all ranks and exit with code 2.

    Most mistakes are made on all ranks alike, and rank 0 prints them. One that this rank alone
    makes is told to the others, which end with it.
    """
    say(error, "ep_plugin: error: ")
    sys.exit(2)


def say(error: Exception, before: str) -> None:
    """Print `error` behind the words `before`: rank 0, or a rank that rank 0 does not hear.

    Every rank leaves it for torchrun's report, which ends with the rank that was seen first.
    """
    from ep_plugin.megatron.seams import alike

    leave_for_torchrun(str(error))
    first = os.environ.get("RANK", "0") == "0"
    if first:
        print(f"{before}{error}", file=sys.stderr, flush=True)
    heard = alike.tell(str(error))
    if not first and not heard and alike.ranks_to_tell():
        print(f"{before}{error}", file=sys.stderr, flush=True)
