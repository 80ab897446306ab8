"""Checkpoints of the distributed optimizer over torch's Adam.

Apex's and Transformer Engine's Adam keep one step per parameter group; torch's keeps a step
tensor per parameter, which the distributed optimizer handles wrongly when it loads: it asks for
the step before there is any state, gives all parameters one shared tensor, so that each update
counts it up for all, and saves it as if it were as large as the parameter. Without those
packages, a resumed run differs.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

OPTIMIZER = "megatron.core.optimizer.distrib_optimizer"
STATE, LOAD = "state_dict", "load_state_dict"
GET, SET = "_get_main_param_and_optimizer_states", "_set_main_param_and_optimizer_states"


def correct() -> None:
    """Correct the distributed optimizer where it runs over torch's Adam; else do nothing."""
    distributed = importlib.import_module(OPTIMIZER)
    optimizer = distributed.DistributedOptimizer
    if distributed.HAVE_APEX_OR_TE or hasattr(optimizer.state_dict, "ep_original"):
        return
    wrappers = {
        STATE: _with_state,
        LOAD: _with_own_steps,
        GET: _without_step,
        SET: _set_all_but_step,
    }
    for name, wrap in wrappers.items():
        original = getattr(optimizer, name)
        corrected = functools.wraps(original)(wrap(original))
        corrected.ep_original = original  # type: ignore[attr-defined]
        setattr(optimizer, name, corrected)


def uncorrect() -> None:
    """Take `correct` back; does nothing without it."""
    optimizer = importlib.import_module(OPTIMIZER).DistributedOptimizer
    for name in (STATE, LOAD, GET, SET):
        original = getattr(getattr(optimizer, name), "ep_original", None)
        if original is not None:
            setattr(optimizer, name, original)


def _with_state(original: Callable[..., Any]) -> Callable[..., Any]:
    """Give a fresh Adam its zero state before its step is read."""

    def state_dict(self: Any) -> Any:
        if not self.optimizer.state and isinstance(self.optimizer, torch.optim.Adam):
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    self.optimizer.state[parameter] = {
                        "step": torch.zeros((), dtype=torch.float32),
                        "exp_avg": torch.zeros_like(parameter.data),
                        "exp_avg_sq": torch.zeros_like(parameter.data),
                    }
        return original(self)

    return state_dict


def _with_own_steps(original: Callable[..., Any]) -> Callable[..., Any]:
    """Give each parameter a step tensor of its own after loading."""

    def load_state_dict(self: Any, state_dict: Any) -> Any:
        result = original(self, state_dict)
        if isinstance(self.optimizer, torch.optim.Adam):
            for state in self.optimizer.state.values():
                state["step"] = state["step"].clone()
        return result

    return load_state_dict


def _without_step(original: Callable[..., Any]) -> Callable[..., Any]:
    """Leave the step out of the tensors that are saved with a parameter's size."""

    def get_states(self: Any, model_param: Any) -> Any:
        return {name: t for name, t in original(self, model_param).items() if name != "step"}

    return get_states


def _set_all_but_step(original: Callable[..., Any]) -> Callable[..., Any]:
    """Copy a checkpoint's tensors into the state; the step came with the parameter groups."""

    def set_states(self: Any, model_param: Any, tensors: dict[str, Any]) -> Any:
        with torch.no_grad():  # an fp32 main parameter is a leaf, and is written in place
            return original(self, model_param, {**tensors, "step": None})

    return set_states
