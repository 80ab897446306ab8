"""Resuming where experts have an optimizer of their own from where they had none, and back.

Without expert parallelism Megatron has one optimizer for everything, with it a second one for the
experts. Moments in the fully reshardable format are kept by parameter and find their place; what
is kept beside them, a step and hyperparameters for each group of parameters, is kept by optimizer,
and Megatron refuses to load it into another number of them. Here it is dealt out anew.
"""

from collections.abc import Callable
from typing import Any

from ep_plugin.megatron.seams.patches import Patches

LOAD = "megatron.core.optimizer.optimizer:ChainedOptimizer.load_state_dict"
SHARDING, STATE = "param_state_sharding_type", "param_state"
FORMATS = ("fully_reshardable", "fully_sharded_model_space")


def changes(patches: Patches) -> None:
    """Deal loaded groups out to the optimizers there are."""
    patches.wrap(
        LOAD, _load_state_dict, "here Megatron refuses the state of another number of optimizers"
    )


def _load_state_dict(original: Callable[..., Any], chained: Any, state: Any) -> Any:
    return original(chained, dealt(state, len(chained.chained_optimizers)))


def dealt(state: Any, num_optimizers: int) -> Any:
    """Return a loaded `state` as one of so many optimizers; others than such are not touched.

    `state` has what was saved by as many optimizers as there were, and under `param_state` or
    under the number of each optimizer the moments that were loaded for those there are.
    """
    if not isinstance(state, dict):
        return state
    if num_optimizers > 1 and state.get(SHARDING) in FORMATS:
        saved = [state]
        loaded = [state[number] for number in range(num_optimizers)]
    elif num_optimizers == 1 and state.get(0, {}).get(SHARDING) in FORMATS:
        saved = [state[number] for number in sorted(k for k in state if isinstance(k, int))]
        loaded = [state]
    else:
        return state
    groups = [group for one in saved for group in one["optimizer"]["param_groups"]]
    groups = [{**g, "is_expert_parallel": flag} for flag in (True, False) for g in groups]
    first = {**saved[0]["optimizer"], "param_groups": groups}
    dealt = [
        {"optimizer": first, SHARDING: saved[0][SHARDING], STATE: one[STATE]} for one in loaded
    ]
    return dict(enumerate(dealt)) if num_optimizers > 1 else dealt[0]
