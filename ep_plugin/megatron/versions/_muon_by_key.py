"""Optimizers for matrices from 0.18 on: a predicate says of each parameter whether it is one."""

from collections.abc import Callable
from typing import Any

from ep_plugin.megatron.seams.matrices import holds_matrices, orthogonalize
from ep_plugin.megatron.seams.patches import Patches
from ep_plugin.megatron.seams.touchpoints import Touchpoint

_OPTIMIZER = "megatron.core.optimizer"
MAKER = f"{_OPTIMIZER}:get_megatron_optimizer"
ORTHOGONALIZE = f"{_OPTIMIZER}.emerging_optimizers:TensorParallelMuon.orthogonalize"
_PREDICATE = f"{_OPTIMIZER}.optimizer_config:ParamPredicate.__call__"
_NO_MATRIX = "nonlinear_or_embedding"  # the predicate's name
_MANAGED = "is_managed_by_layer_wise_optimizer"
# The second has bound the function's name in its own module, for the learning rates of MuP.
_MANAGERS = (f"{_OPTIMIZER}.layer_wise_optimizer:{_MANAGED}", f"{_OPTIMIZER}:{_MANAGED}")

TOUCHPOINTS = (
    Touchpoint(ORTHOGONALIZE, ("p", "grad")),
    Touchpoint(_PREDICATE, ("param",)),
    Touchpoint(f"{_OPTIMIZER}.optimizer_config:ParamPredicate", ("name",)),
    *(Touchpoint(place, ("param",)) for place in _MANAGERS),
)


def changes(patches: Patches) -> None:
    """Let stacks of experts be stepped as matrices, and their biases as vectors."""
    patches.wrap(
        ORTHOGONALIZE, orthogonalize, "Muon steps a matrix here; stacks of experts are several"
    )
    patches.wrap(
        _PREDICATE,
        _is_no_matrix,
        "what is no matrix by its shape goes to Adam; stacks of experts are matrices",
    )
    for place in _MANAGERS:
        patches.wrap(
            place,
            _is_matrix,
            "the layer-wise optimizer finds its matrices by shape; stacks of experts join them",
        )


def _is_no_matrix(original: Callable[..., bool], predicate: Any, param: Any) -> bool:
    holds = holds_matrices(param)
    asked = holds is not None and predicate.name == _NO_MATRIX
    return not holds if asked else original(predicate, param)


def _is_matrix(original: Callable[..., bool], param: Any) -> bool:
    holds = holds_matrices(param)
    return original(param) if holds is None else holds
