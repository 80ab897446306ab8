"""Which of many tensors hold nan or inf: every value read once, in few kernels, one answer.

The largest magnitude of a tensor is nan or inf exactly where one of its values is. It is finite in
the tensor's own dtype wherever all values are, which a sum of squares need not be.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby

import torch
from torch import Tensor

_BYTES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)


def any_nonfinite(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return [] int64 on `device`, 1 where any value of any tensor is nan or inf; no host sync.

    Tensors of integers count as finite. Those on another device are read there, and then the host
    waits for that device.
    """
    flags = [(~torch.isfinite(_magnitudes(bucket))).any() for bucket in _buckets(tensors)]
    return sum((flag.to(device, torch.int64) for flag in flags), _zero(device)).clamp(max=1)


def nonfinite(named: Mapping[str, Tensor]) -> dict[str, str]:
    """Return name -> "nan" or "inf" for each tensor that holds one, in the order of `named`."""
    found = {}
    for name, tensor in named.items():
        for bucket in _buckets([tensor]):
            ends = _magnitudes(bucket)
            if not bool(torch.isfinite(ends).all()):
                found[name] = "nan" if bool(torch.isnan(ends).any()) else "inf"
    return found


def _zero(device: torch.device) -> Tensor:
    return torch.zeros((), dtype=torch.int64, device=device)


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Return the tensors that can hold nan, those of one device and dtype together."""
    plain = [plain for tensor in tensors if (plain := _plain(tensor)) is not None]
    plain.sort(key=_kind)
    return [list(bucket) for _, bucket in groupby(plain, key=_kind)]


def _kind(tensor: Tensor) -> tuple[str, str]:
    return str(tensor.device), str(tensor.dtype)


def _plain(tensor: Tensor) -> Tensor | None:
    """Return this rank's values in a dtype with arithmetic; None where there can be no nan."""
    tensor = tensor.detach()
    if hasattr(tensor, "to_local"):  # a DTensor: the others' parts are theirs to read
        tensor = tensor.to_local()
    if hasattr(tensor, "dequantize") and type(tensor) is not Tensor:  # Transformer Engine's FP8
        tensor = tensor.dequantize()
    if tensor.numel() == 0 or not tensor.is_floating_point():
        return None
    return tensor.float() if tensor.dtype in _BYTES else tensor


def _magnitudes(bucket: Sequence[Tensor]) -> Tensor:
    """Return [N] or [2 N], the largest magnitude of each tensor, or its ends where that is faster.

    Each is nan where a value is.
    """
    if bucket[0].is_cuda:
        return torch.stack(torch._foreach_norm(list(bucket), ord=float("inf")))
    return torch.stack([end for tensor in bucket for end in torch.aminmax(tensor)])
