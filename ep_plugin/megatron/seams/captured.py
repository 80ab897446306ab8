"""Graphs of whole layers: what is counted while they are made counts for nothing.

Megatron runs each layer some times before it captures it, with tokens of no meaning. Its own sums
it clears afterwards; ours are put back as they were.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from ep_plugin.megatron.block.graphs import note_layers
from ep_plugin.megatron.seams.patches import Patches

MADE = "megatron.core.transformer.cuda_graphs:TECudaGraphHelper.create_cudagraphs"


def changes(patches: Patches, layer_class: Any) -> None:
    """Note the change that puts back what capturing layers counted."""
    patches.wrap(
        MADE,
        functools.partial(_with_our_sums_as_before, layer_class),
        "layers are captured here, with tokens of no meaning, which our routers would count",
    )


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
