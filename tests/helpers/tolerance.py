"""The one error measure and its bounds; no test has a tolerance of its own."""

import torch
from torch import Tensor

MAX_ERROR = {
    torch.float64: 1e-12,
    torch.float32: 1e-6,
    torch.bfloat16: 1e-4,
}


def error(actual: Tensor, expected: Tensor) -> float:
    """Return 1 - 2<x,y>/(<x,x> + <y,y>): 0 when equal, whatever the scale; 0 when both vanish."""
    x, y = actual.detach().double().flatten(), expected.detach().double().flatten()
    assert x.shape == y.shape, (x.shape, y.shape)
    scale = float(x @ x + y @ y)
    return float((x - y) @ (x - y)) / scale if scale else 0.0


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype, what: str = "") -> None:
    """Fail unless the error is within the bound of `dtype` and everything is finite."""
    assert actual.isfinite().all(), f"{what}: not finite"
    measured = error(actual, expected)
    assert measured <= MAX_ERROR[dtype], f"{what}: error {measured:.2e} > {MAX_ERROR[dtype]:.0e}"
