"""The optimizer of the dense run, carried over to the run that continues with experts.

Megatron keeps it by parameter where it can be resharded,

    optimizer.state.{exp_avg,exp_avg_sq,param,fp32_param}.PARAMETER       tensors
    common["optimizer"]: param_groups (learning rate, decay) and step     counters

and by buckets of one very layout otherwise (`dp_reshardable`), from which no expert can be made.
A run with EP above 1 has two optimizers, of the dense parameters and of the experts, under 0 and 1;
the experts' has the groups of the dense one, marked as expert-parallel. A run with EP = 1 has one.
Tensors are the same for both, counters are not, so Megatron resumes only the kind it finds.
"""

import copy
import re
from collections.abc import Set
from dataclasses import dataclass
from typing import Any

import torch

from ep_plugin.checkpoint.tensors import Source
from ep_plugin.errors import ConfigError

MASTER_COPIES = ("param", "fp32_param", "master_param")
_STATE = re.compile(r"(optimizer\.state\.(\w+)\.)(.+)")
_INSTEAD = (
    "save the run with --dist-ckpt-optim-fully-reshardable (or without "
    "--use-distributed-optimizer), or leave the optimizer out with --drop-optimizer"
)


@dataclass(frozen=True)
class State:
    """One kind of state, for all parameters that have it."""

    prefix: str  # optimizer.state.exp_avg.
    dtype: torch.dtype
    names: tuple[str, ...]
    is_moment: bool  # else a copy of the weights


def find(source: Source, parameters: Set[str]) -> tuple[State, ...]:
    """Return the kinds of state in `source`, a dense run's; none where it has no optimizer.

    Raises ConfigError for state that does not belong to a parameter each.
    """
    states = by_parameter(source, parameters, "experts")
    groups = source.common.get("optimizer")
    if states and (not isinstance(groups, dict) or any(isinstance(key, int) for key in groups)):
        raise ConfigError(
            f"{source.folder} holds optimizer state but not the groups of one optimizer; {_INSTEAD}"
        )
    return states


def by_parameter(source: Source, parameters: Set[str], takers: str) -> tuple[State, ...]:
    """Return the kinds of state of a run with one optimizer or two; `takers` are to get it.

    Raises ConfigError for state that does not belong to a parameter each.
    """
    names = [n for n in (*source.tensors, *sorted(source.objects)) if _is_optimizer(n)]
    if not names:
        return ()
    found = {name: _STATE.fullmatch(name) for name in names}
    strange = [n for n, m in found.items() if m is None or not _fits(source, m[3], n, parameters)]
    if strange:
        raise ConfigError(
            f"the optimizer state of {source.folder} is not kept by parameter ({strange[0]} and "
            f"{len(strange) - 1} more), so it cannot be given to {takers}; {_INSTEAD}"
        )
    by_prefix: dict[str, list[str]] = {}
    for name, match in found.items():
        assert match is not None
        by_prefix.setdefault(match[1], []).append(name)
    return tuple(
        State(
            prefix=prefix,
            dtype=source.tensors[members[0]].dtype,
            names=tuple(members),
            is_moment=prefix.split(".")[-2] not in MASTER_COPIES,
        )
        for prefix, members in by_prefix.items()
    )


def counters(source: Source, ep: int | None, with_bias: bool) -> dict[str, Any]:
    """Return what stands beside the tensors of the optimizer, for a run of that size."""
    groups = source.common["optimizer"]
    return {
        "optimizer": groups if ep == 1 else new_groups(groups, with_bias),
        "opt_param_scheduler": source.common["opt_param_scheduler"],
    }


def new_groups(groups: dict[str, Any], with_bias: bool) -> dict[int, Any]:
    """Return the counters of the two optimizers of a run with EP above 1.

    The experts have no group for parameters without weight decay unless they have biases.
    """
    experts = copy.deepcopy(groups)
    inner = experts.get("optimizer", experts)
    inner["param_groups"] = [
        {**group, "is_expert_parallel": True}
        for group in inner["param_groups"]
        if not group.get("is_decoupled_lr") and (with_bias or group.get("wd_mult", 1.0) != 0)
    ]
    return {0: groups, 1: experts}


def _is_optimizer(name: str) -> bool:
    return name.startswith("optimizer.") or re.match(r"chained_\d+\.optimizer\.", name) is not None


def _fits(source: Source, parameter: str, state: str, parameters: Set[str]) -> bool:
    """Whether `state` is a tensor of the shape of its parameter."""
    if parameter not in parameters or parameter not in source.tensors:
        return False
    return (
        state in source.tensors and source.tensors[state].shape == source.tensors[parameter].shape
    )
