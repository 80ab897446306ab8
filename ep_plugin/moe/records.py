"""Tensors, and records of tensors such as `e4m3.Rows8`, taken apart and put together."""

from typing import Any

import torch
from torch import Tensor


def parts_of(value: Any) -> list[Tensor]:
    """Return the tensors of a tensor, of a record of tensors, or of nothing."""
    if value is None:
        return []
    return [value] if isinstance(value, Tensor) else list(vars(value).values())


def whole_of(kind: Any, parts: list[Tensor]) -> Any:
    """Return what `parts_of` was given, of type `kind`."""
    if kind is type(None):
        return None
    return parts[0] if issubclass(kind, Tensor) else kind(*parts)


def joined(pieces: list[Any]) -> Any:
    """Return one matrix, or record of matrices, with the rows of all pieces."""
    tensors = [torch.cat(same) for same in zip(*map(parts_of, pieces), strict=True)]
    return whole_of(type(pieces[0]), tensors)
