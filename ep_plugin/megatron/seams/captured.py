"""Graphs of whole layers: what they counted while they were made counts for nothing.

Megatron runs each layer some times before it captures it, with tokens of no meaning.
"""

import functools
from collections.abc import Callable
from typing import Any

from ep_plugin.megatron.seams.patches import Patches

MADE = "megatron.core.transformer.cuda_graphs:TECudaGraphHelper.create_cudagraphs"


def changes(patches: Patches, layer_class: Any) -> None:
    """Note the change that forgets what was routed while layers were captured."""
    patches.wrap(
        MADE,
        functools.partial(_with_our_counts_forgotten, layer_class),
        "layers are captured here, with tokens of no meaning, which our tracker would count",
    )


def _with_our_counts_forgotten(
    layer_class: Any, original: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    result = original(*args, **kwargs)
    layer_class.tracker.forget()
    return result
