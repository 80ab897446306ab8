"""Run a script with CPU mode but without our block: Megatron's own is the peer."""

import runpy
import sys
from pathlib import Path

from ep_plugin.megatron.cpu import mode as cpu_mode
from ep_plugin.megatron.seams import torch_adam, wheel
from ep_plugin.megatron.seams.patches import Patches

if __name__ == "__main__":
    if cpu_mode.wanted():
        cpu_mode.enable()
    patches = Patches()
    wheel.changes(patches)
    torch_adam.changes(patches)
    patches.apply()
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
