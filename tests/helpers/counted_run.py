"""Run a script under the plugin, and print which methods of a user's own options were called.

python counted_run.py SCRIPT [ARGS ...]
"""

import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

from my_moe.dispatcher import MyDispatcher
from my_moe.gemm import MyGemm
from my_moe.router import MyRouter

from ep_plugin.run import main

METHODS = (
    *((MyRouter, "forward"), (MyDispatcher, "start_dispatch"), (MyDispatcher, "start_combine")),
    *((MyGemm, "forward"), (MyGemm, "dgrad"), (MyGemm, "wgrad")),
)


def count_calls(calls: Counter[str]) -> None:
    """Count the calls of `METHODS` in `calls` from now on."""
    for owner, name in METHODS:
        setattr(owner, name, counted(getattr(owner, name), f"{owner.__name__}.{name}", calls))


def counted(method: Callable[..., Any], name: str, calls: Counter[str]) -> Callable[..., Any]:
    """Return `method`, its calls counted under `name`."""

    def call(*args: Any, **kwargs: Any) -> Any:
        calls[name] += 1
        return method(*args, **kwargs)

    return call


if __name__ == "__main__":
    calls: Counter[str] = Counter()
    count_calls(calls)
    code = main(sys.argv[1:])
    sys.stdout.write(f"called: {' '.join(sorted(calls))}\n")  # one write: ranks share the stream
    sys.stdout.flush()
    sys.exit(code)
