"""Expert bias in a model whose layers differ in their number of experts.

At the end of a step Megatron stacks the token counts of all routers into one tensor, updates the
biases and writes them back. Stacking needs equal lengths. So here its update runs once for each
number of experts in the model, over the routers with that number.
"""

from collections.abc import Callable, Sequence
from typing import Any

from ep_plugin.megatron.seams.patches import Patches

UPDATE = "megatron.core.distributed.finalize_model_grads:_update_router_expert_bias"


def changes(patches: Patches) -> None:
    """Patch Megatron to update biases separately for each number of experts."""
    patches.wrap(
        UPDATE, _by_number, "Megatron stacks all biases here, which needs layers of one size"
    )


class _Part:
    """Stands for a model chunk in Megatron's update, which reads `modules()`: some routers."""

    def __init__(self, routers: Sequence[Any]) -> None:
        self._routers = routers

    def modules(self) -> Sequence[Any]:
        return self._routers


def _by_number(original: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> None:
    """Run Megatron's update (`original`) for each number of experts, in ascending order.

    The update communicates. The ranks that take part hold the same layers, so their order is equal.
    """
    routers: dict[int, list[Any]] = {}
    for chunk in model:
        for module in chunk.modules():
            if getattr(module, "expert_bias", None) is not None:
                routers.setdefault(len(module.expert_bias), []).append(module)
    for number in sorted(routers):
        original([_Part(routers[number])], *args, **kwargs)
