"""The module of a worker, for a process that has Megatron to itself.

Here it is imported, and Megatron with it, after packages that only a GPU can run are hidden.
"""

import sys
from importlib import import_module
from typing import Any

from ep_plugin.megatron.cpu import gpu_packages
from ep_plugin.megatron.cpu import mode as cpu_mode


def load(module: str, on_cpu: bool = False) -> Any:
    """Return a worker's module; `on_cpu`: it takes the CPU where there is a GPU, too.

    Raises ConfigError where Megatron was imported before with what the CPU cannot run.
    """
    if on_cpu or cpu_mode.wanted():
        gpu_packages.hide()
    return import_module(module)


if __name__ == "__main__":
    sys.exit(load(sys.argv[1]).main(sys.argv[2:]))
