"""Muon in 0.16 and 0.17: made with all else frozen, then Adam with the matrices frozen."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ep_plugin.megatron.seams.matrices import holds_matrices, orthogonalize
from ep_plugin.megatron.seams.patches import Patches
from ep_plugin.megatron.seams.touchpoints import Touchpoint

_MUON = "megatron.core.optimizer.muon"
MAKER = f"{_MUON}:get_megatron_muon_optimizer"
ORTHOGONALIZE = f"{_MUON}:TensorParallelMuon.orthogonalize"
_GROUPS = f"{_MUON}:_get_param_groups"
_OTHERS = f"{_MUON}:get_megatron_optimizer"

TOUCHPOINTS = (
    Touchpoint(ORTHOGONALIZE, ("p", "grad")),
    Touchpoint(_GROUPS, ("model_chunks", "config", "config_overrides")),
    Touchpoint(_OTHERS, ("config", "model_chunks", "config_overrides")),
)


def changes(patches: Patches) -> None:
    """Let stacks of experts be stepped as matrices, and their biases as vectors."""
    patches.wrap(
        ORTHOGONALIZE, orthogonalize, "Muon steps a matrix here; stacks of experts are several"
    )
    patches.wrap(
        _GROUPS,
        _groups_of_matrices,
        "what is no matrix by its shape is frozen here; stacks of experts are matrices",
    )
    patches.wrap(
        _OTHERS,
        _others,
        "Adam for what is no matrix is made here; stacks of experts are none of it",
    )


def _groups_of_matrices(
    original: Callable[..., Any], model_chunks: list[Any], *rest: Any, **kwargs: Any
) -> Any:
    with _trained(model_chunks, matrices=True):
        return original(model_chunks, *rest, **kwargs)


def _others(
    original: Callable[..., Any], config: Any, model_chunks: list[Any], *rest: Any, **kwargs: Any
) -> Any:
    with _trained(model_chunks, matrices=False):
        return original(config, model_chunks, *rest, **kwargs)


@contextmanager
def _trained(model_chunks: list[Any], *, matrices: bool) -> Iterator[None]:
    """Of the experts that are trained let only the matrices seem so, or only the vectors.

    Megatron has marked each of them with `expert_tp` before, unless the user has frozen it.
    """
    parameters = [parameter for chunk in model_chunks for parameter in chunk.parameters()]
    experts = [
        parameter
        for parameter in parameters
        if holds_matrices(parameter) is not None and getattr(parameter, "expert_tp", False)
    ]
    before = [parameter.requires_grad for parameter in experts]
    for parameter in experts:
        parameter.requires_grad = holds_matrices(parameter) is matrices
    try:
        yield
    finally:
        for parameter, trained in zip(experts, before, strict=True):
            parameter.requires_grad = trained
