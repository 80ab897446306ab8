"""What a rank will save: its weights, master weights, moments and buffers, with their names."""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

from torch import Tensor

# Of an optimizer of Megatron's: the model's parameters, and what it steps in their place.
_PAIRS = (
    ("model_float16_groups", "shard_fp32_from_float16_groups"),
    ("model_float16_groups", "shard_float16_groups"),
    ("model_fp32_groups", "shard_fp32_groups"),
    ("float16_groups", "fp32_from_float16_groups"),
)


@dataclass(frozen=True)
class Held:
    """A tensor of this rank's, of any shape and dtype."""

    tensor: Tensor
    parameter: Tensor | None  # of the model, that it is or belongs to
    prefix: str  # before that parameter's name in a checkpoint, such as optimizer.state.exp_avg.
    name: str  # of the module's own, where a checkpoint has none


def held(model: list[Any], optimizer: Any, without: Collection[str] = ()) -> list[Held]:
    """Return what the rank holds; `model` is its chunks without wrappers, `optimizer` may be None.

    A distributed optimizer's tensors are this rank's shards. Left out are buffers that are not
    saved, those that `without` names as `buffers` does, and the steps of an optimizer.
    """
    names = {id(parameter): name for chunk in model for name, parameter in chunk.named_parameters()}
    weights = (Held(p, p, "", name) for chunk in model for name, p in chunk.named_parameters())
    kept = (
        Held(buffer, buffer, "", name.partition(":")[2])
        for name, buffer in buffers(model).items()
        if name not in without
    )
    parts = (part for one in _optimizers(optimizer) for part in _of_optimizer(one, names))
    return list(chain(weights, kept, parts))


def buffers(model: list[Any]) -> dict[str, Tensor]:
    """Return `NUMBER OF CHUNK:NAME` -> the buffer, of those that are saved."""
    return {
        f"{number}:{f'{path}.{name}'.lstrip('.')}": buffer
        for number, chunk in enumerate(model)
        for path, module in chunk.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }


def _optimizers(optimizer: Any) -> Iterator[Any]:
    """Yield Megatron's optimizers, those that a chain is made of one by one."""
    if optimizer is None:
        return
    parts = getattr(optimizer, "chained_optimizers", None)
    if parts is None:
        yield optimizer
    for part in parts or ():
        yield from _optimizers(part)


def _of_optimizer(optimizer: Any, names: dict[int, str]) -> Iterator[Held]:
    steps = getattr(optimizer, "optimizer", None)  # torch's, which does the steps
    if steps is None:
        return
    owners = _owners(optimizer, steps)
    master = "param" if hasattr(optimizer, "gbuf_ranges") else "fp32_param"
    for part in getattr(steps, "sub_optimizers", None) or [steps]:  # one a device, offloaded
        for stepped in (p for group in part.param_groups for p in group["params"]):
            parameter = owners.get(id(stepped), stepped)
            name = names.get(id(parameter), f"a parameter of {type(part).__name__}")
            if parameter is not stepped:
                yield Held(stepped, parameter, f"optimizer.state.{master}.", name)
            for key, value in part.state.get(stepped, {}).items():
                if isinstance(value, Tensor) and key != "step" and value is not stepped:
                    yield Held(value, parameter, f"optimizer.state.{key}.", name)


def _owners(optimizer: Any, steps: Any) -> dict[int, Tensor]:
    """Return id of a tensor that is stepped -> the model's parameter."""
    owners: dict[int, Tensor] = {}
    for theirs, ours in _PAIRS:
        groups = getattr(optimizer, theirs, ()), getattr(optimizer, ours, ())  # or none of a kind
        for models, stepped in zip(*groups, strict=False):
            owners |= {id(s): m for m, s in zip(models, stepped, strict=True) if s is not None}
    for inner, outer in getattr(steps, "inner_param_to_orig_param", {}).items():
        owners[id(inner)] = owners.get(id(outer), outer)
    return owners


class Names:
    """The names that tensors have in a checkpoint. Making it needs no communication."""

    def __init__(self, model: list[Any]) -> None:
        from megatron.core import parallel_state
        from megatron.core.dist_checkpointing.dict_utils import nested_values

        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        metadata = {
            **{"singleton_local_shards": False, "non_homogeneous_layers": True},
            "dp_cp_group": group,
        }
        self._entries: dict[int, Any] = {}
        for chunk in model:
            for entry in nested_values(chunk.sharded_state_dict(metadata=metadata)):
                if isinstance(getattr(entry, "data", None), Tensor):
                    self._entries.setdefault(entry.data.data_ptr(), entry)

    def of(self, part: Held) -> tuple[str, str]:
        """Return the name, and ` (layer 3)` where it has a layer, counted from 0."""
        entry = self._entries.get(part.parameter.data_ptr()) if part.parameter is not None else None
        name = part.prefix + (part.name if entry is None else entry.key)
        layer = re.search(r"\blayers\.(\d+)\.", name)
        return name, f" (layer {layer[1]})" if layer else ""
