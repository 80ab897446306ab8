"""How a user's mistake ends a run: one sentence, once, and exit code 2 on every rank."""

import os
import sys
from typing import NoReturn

from ep_plugin.errors import ConfigError


def refuse(error: ConfigError) -> NoReturn:
    """Print the error once for all ranks and exit with code 2."""
    if os.environ.get("RANK", "0") == "0":
        print(f"ep_plugin: error: {error}", file=sys.stderr, flush=True)
    sys.exit(2)
