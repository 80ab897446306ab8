"""Run a script with CPU mode but without our block: Megatron's own is the peer."""

import runpy
import sys
from pathlib import Path

from ep_plugin.megatron.cpu import mode as cpu_mode
from ep_plugin.megatron.seams import torch_adam
from ep_plugin.megatron.seams.wheel import without_compilation

if __name__ == "__main__":
    if cpu_mode.wanted():
        cpu_mode.enable()
    without_compilation()
    torch_adam.correct()
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
