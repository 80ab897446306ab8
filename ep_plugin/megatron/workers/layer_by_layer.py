"""A model of which one layer at a time has memory: it is loaded when it is called, and freed after.

What lies outside the layers (embedding, last norm, output) stays. Buffers are made as ever: rotary
tables are in no checkpoint.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def without_memory() -> Iterator[None]:
    """Give modules that are built inside parameters on the meta device."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, None if parameter is None else _on(parameter, "meta"))

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def move(module: nn.Module, device: str, but: nn.Module | None = None) -> None:
    """Put parameters on "cpu", where they hold anything, or on "meta"; `but` one part of it."""
    left = set() if but is None else set(but.modules())
    for part in module.modules():
        if part not in left:
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    part._parameters[name] = _on(parameter, device)


def load_when_called(layer: nn.Module, load: Callable[[], Any]) -> None:
    """Let `layer` have memory during a call alone; `load()` fills it before."""

    def before(*_: Any) -> None:
        move(layer, "cpu")
        load()

    layer.register_forward_pre_hook(before)
    layer.register_forward_hook(lambda *_: move(layer, "meta"))


def _on(parameter: nn.Parameter, device: str) -> nn.Parameter:
    values = torch.empty_like(parameter, device=device)
    moved = nn.Parameter(values, requires_grad=parameter.requires_grad)
    moved.__dict__.update(parameter.__dict__)  # Megatron's marks, such as tensor_model_parallel
    return moved
