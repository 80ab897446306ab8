"""Imported first where ranks are on the CPU: hides what Megatron would take for a GPU.

Without a GPU, tests import Megatron before CPU mode begins. In a container with Transformer Engine
or apex it would keep kernels that cannot run here.
"""

import torch

from ep_plugin.megatron.cpu import gpu_packages
from ep_plugin.megatron.seams.patches import Patches

hidden = Patches()  # apart from CPU mode's own, which a test may end
if not torch.cuda.is_available():
    for name in gpu_packages.installed():
        hidden.hide(name, gpu_packages.WHY)
    hidden.apply()
