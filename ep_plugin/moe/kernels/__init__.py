"""Fused kernels in Triton, for CUDA tensors, beside plain-torch twins that run anywhere."""

from functools import cache
from importlib import import_module
from types import ModuleType

from torch import Tensor


def select(tensor: Tensor) -> ModuleType:
    """Return module `_on_cuda` for a CUDA tensor, else `_on_any`; both have the same functions."""
    return _module("_on_cuda" if tensor.is_cuda else "_on_any")


@cache
def _module(name: str) -> ModuleType:
    return import_module(f"{__name__}.{name}")
