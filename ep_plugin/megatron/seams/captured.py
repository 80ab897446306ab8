"""Graphs of whole layers: what is counted while they are made counts for nothing.

Megatron runs each layer some times before it captures it, with tokens of no meaning. Its own sums
it clears afterwards; ours are put back as they were.

Gradients that a replay returns are not copied first where DDP's hooks take them at once: also of
gradients that were added to fp32 totals a copy of their placeholder was made, for each expert.
"""

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch

from ep_plugin.megatron.block.graphs import note_layers
from ep_plugin.megatron.seams.patches import Patches

_GRAPHS = "megatron.core.transformer.cuda_graphs"
_HELPER = f"{_GRAPHS}:TECudaGraphHelper"
MADE = f"{_HELPER}.create_cudagraphs"
INPUTS = f"{_HELPER}._get_cuda_graph_input_data"
COPIES = "clone_param_grads_on_return"  # of Transformer Engine's make_graphed_callables, newer ones


def changes(patches: Patches, layer_class: Any) -> None:
    """Note the change that puts back what capturing layers counted."""
    patches.wrap(
        MADE,
        functools.partial(_with_our_sums_as_before, layer_class),
        "layers are captured here, with tokens of no meaning, which our routers would count",
    )
    patches.wrap(
        INPUTS,
        _without_copies,
        "how layers are captured is decided here, copies of the gradients that come back included",
    )


def _without_copies(original: Callable[..., Any], helper: Any, *args: Any, **kwargs: Any) -> Any:
    samples, how = original(helper, *args, **kwargs)
    takes_at_once = sys.modules["megatron.core.distributed"].DistributedDataParallel
    known = inspect.signature(sys.modules[_GRAPHS].make_graphed_callables).parameters
    if COPIES in known and all(isinstance(chunk, takes_at_once) for chunk in helper.model):
        how.setdefault(COPIES, False)
    return samples, how


def _with_our_sums_as_before(
    layer_class: Any, original: Callable[..., Any], helper: Any, *args: Any, **kwargs: Any
) -> Any:
    note_layers(helper)
    blocks = [m for chunk in helper.model for m in chunk.modules() if isinstance(m, layer_class)]
    buffers = [buffer for block in blocks for buffer in block.buffers()]
    tracker = layer_class.tracker
    summed = tracker.sums if tracker is not None else list
    before = [(tensor, tensor.clone()) for tensor in (*buffers, *summed())]
    result = original(helper, *args, **kwargs)
    with torch.no_grad():
        for tensor in summed():  # there may be new ones, which no step has added to
            tensor.zero_()
        for tensor, values in before:
            tensor.copy_(values)
    return result
