"""Expert bias in a model whose layers differ in their number of experts.

At the end of a step Megatron stacks the counts of all routers into one tensor, moves the biases and
writes them back. Stacking needs one length, so here its update runs once for each number of experts
that the model has, over the routers of that number alone.
"""

from collections.abc import Callable, Sequence
from typing import Any

from ep_plugin.megatron.seams.patches import Patches

UPDATE = "megatron.core.distributed.finalize_model_grads:_update_router_expert_bias"


def changes(patches: Patches) -> None:
    """Let biases be updated number by number."""
    patches.wrap(
        UPDATE, _by_number, "Megatron stacks all biases here, which needs layers of one size"
    )


class _Part:
    """What Megatron's update reads of a model chunk: its modules; here the routers of one size."""

    def __init__(self, routers: Sequence[Any]) -> None:
        self._routers = routers

    def modules(self) -> Sequence[Any]:
        return self._routers


def _by_number(original: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> None:
    """Update the routers of each number of experts; ranks that exchange have the same layers."""
    routers: dict[int, list[Any]] = {}
    for chunk in model:
        for module in chunk.modules():
            if getattr(module, "expert_bias", None) is not None:
                routers.setdefault(len(module.expert_bias), []).append(module)
    for number in sorted(routers):
        original([_Part(routers[number])], *args, **kwargs)
