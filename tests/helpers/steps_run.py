"""Run a script with the plugin, and say in which order rank 0 ran the steps of its MoE layers.

Each step is the name of its function in `combined`; those of the backward end in `'`.
"""

import atexit
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ep_plugin.megatron import install
from ep_plugin.megatron.block import combined

STEPS = ("route", "dispatch", "routed_experts_compute", "combine")
BACKWARDS = {"_Behind": "routed_experts_compute'", "_StandIn": "dispatch'"}  # its end, its start


def noting(steps: list[str], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def noted(*args: Any) -> Any:
        steps.append(name)
        return function(*args)

    return noted


if __name__ == "__main__":
    steps: list[str] = []
    install()
    from ep_plugin.megatron.block.adapter import EPMoELayer

    for step in STEPS:
        setattr(EPMoELayer, step, noting(steps, step, getattr(combined, step)))
    for owner, name in BACKWARDS.items():
        function = getattr(combined, owner)
        function.backward = staticmethod(noting(steps, name, function.backward))
    if os.environ["RANK"] == "0":
        atexit.register(lambda: print("steps:", *steps, flush=True))
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
