"""torch.compile as peers are measured with it: code for the sizes at hand, in one graph."""

from collections.abc import Callable
from typing import Any

import torch

MOST = 256  # compiled forms of one function: each shape of a run has its own, forward and backward
SWITCHES = "torch.compile of the layer, fullgraph"


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` compiled; sizes of an earlier shape do not make it dynamic."""
    torch._dynamo.config.recompile_limit = MOST
    return torch.compile(function, fullgraph=True, dynamic=False)
