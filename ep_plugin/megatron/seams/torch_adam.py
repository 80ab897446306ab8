"""Checkpoints of the distributed optimizer over torch's Adam.

Apex's and Transformer Engine's Adam keep one step per parameter group; torch's keeps a step
tensor per parameter, which the distributed optimizer handles wrongly when it loads: it asks for
the step before there is any state, gives all parameters one shared tensor, so that each update
counts it up for all, and saves it as if it were as large as the parameter. Without those
packages, a resumed run differs.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch

from ep_plugin.megatron.seams.patches import Patches

OPTIMIZER = "megatron.core.optimizer.distrib_optimizer"


def changes(patches: Patches) -> None:
    """Correct the distributed optimizer where it runs over torch's Adam; else do nothing."""
    if importlib.import_module(OPTIMIZER).HAVE_APEX_OR_TE:
        return
    optimizer = f"{OPTIMIZER}:DistributedOptimizer"
    patches.wrap(
        f"{optimizer}.state_dict",
        _with_state,
        "it reads the step, which torch's Adam has only after its first update",
    )
    patches.wrap(
        f"{optimizer}.load_state_dict",
        _with_own_steps,
        "it gives all parameters one shared step, which each update would count up for all",
    )
    patches.wrap(
        f"{optimizer}._get_main_param_and_optimizer_states",
        _without_step,
        "what it returns is saved as if it were as large as the parameter; a step is not",
    )
    patches.wrap(
        f"{optimizer}._set_main_param_and_optimizer_states",
        _set_all_but_step,
        "it asks a checkpoint for the step of each parameter, which is not saved there",
    )


def _with_state(original: Callable[..., Any], optimizer: Any) -> Any:
    """Give a fresh Adam its zero state before its step is read."""
    adam = optimizer.optimizer
    if not adam.state and isinstance(adam, torch.optim.Adam):
        for group in adam.param_groups:
            for parameter in group["params"]:
                adam.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32),
                    "exp_avg": torch.zeros_like(parameter.data),
                    "exp_avg_sq": torch.zeros_like(parameter.data),
                }
    return original(optimizer)


def _with_own_steps(original: Callable[..., Any], optimizer: Any, state_dict: Any) -> Any:
    """Give each parameter a step tensor of its own after loading."""
    result = original(optimizer, state_dict)
    if isinstance(optimizer.optimizer, torch.optim.Adam):
        for state in optimizer.optimizer.state.values():
            state["step"] = state["step"].clone()
    return result


def _without_step(original: Callable[..., Any], optimizer: Any, model_param: Any) -> Any:
    """Leave the step out of the tensors that are saved with a parameter's size."""
    tensors = original(optimizer, model_param)
    return {name: tensor for name, tensor in tensors.items() if name != "step"}


def _set_all_but_step(
    original: Callable[..., Any], optimizer: Any, model_param: Any, tensors: dict[str, Any]
) -> Any:
    """Copy a checkpoint's tensors into the state; the step came with the parameter groups."""
    with torch.no_grad():  # an fp32 main parameter is a leaf, and is written in place
        return original(optimizer, model_param, {**tensors, "step": None})
