"""Which of many tensors hold nan or inf: every value read once, in few kernels, one answer.

The largest magnitude of a tensor is nan or inf exactly where one of its values is. It is finite in
the tensor's own dtype wherever all values are, which a sum of squares need not be.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

import torch
from torch import Tensor

_BYTES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)


def any_nonfinite(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return [] int64 on `device`, 1 where any value of any tensor is nan or inf; no host sync.

    Tensors of integers count as finite. Those on another device are read there, and then the host
    waits for that device.
    """
    flags = [(~torch.isfinite(ends)).any() for ends in _all_magnitudes(tensors)]
    return sum((flag.to(device, torch.int64) for flag in flags), _zero(device)).clamp(max=1)


def nonfinite(named: Mapping[str, Tensor]) -> dict[str, str]:
    """Return name -> "nan" or "inf" for each tensor that holds one, in the order of `named`."""
    found = {}
    for name, tensor in named.items():
        for ends in _all_magnitudes([tensor]):
            if not bool(torch.isfinite(ends).all()):
                found[name] = "nan" if bool(torch.isnan(ends).any()) else "inf"
    return found


def _zero(device: torch.device) -> Tensor:
    return torch.zeros((), dtype=torch.int64, device=device)


def _all_magnitudes(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield magnitudes of all tensors that can hold nan, those of a device and dtype together.

    What has to be converted is, one tensor at a time: all at once are 2 to 4 times its bytes.
    """
    local = [_local(tensor) for tensor in tensors]
    for tensor in filter(_is_packed, local):
        converted = _converted(tensor)
        if _can_be_wrong(converted):
            yield _magnitudes([converted])
        del converted  # before the next one is made
    plain = [tensor for tensor in local if not _is_packed(tensor) and _can_be_wrong(tensor)]
    for _, bucket in groupby(sorted(plain, key=_kind), key=_kind):
        yield _magnitudes(list(bucket))


def _kind(tensor: Tensor) -> tuple[str, str]:
    return str(tensor.device), str(tensor.dtype)


def _local(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    # Of a DTensor the others' parts are theirs to read.
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _is_packed(tensor: Tensor) -> bool:
    """Whether the tensor is of a dtype without arithmetic."""
    return tensor.dtype in _BYTES or _is_quantized(tensor)


def _is_quantized(tensor: Tensor) -> bool:
    return type(tensor) is not Tensor and hasattr(tensor, "dequantize")  # Transformer Engine's FP8


def _converted(tensor: Tensor) -> Tensor:
    tensor = tensor.dequantize() if _is_quantized(tensor) else tensor
    return tensor.float() if tensor.dtype in _BYTES else tensor


def _can_be_wrong(tensor: Tensor) -> bool:
    return tensor.numel() > 0 and tensor.is_floating_point()


def _magnitudes(bucket: Sequence[Tensor]) -> Tensor:
    """Return [N] or [2 N], the largest magnitude of each tensor, or its ends where that is faster.

    Each is nan where a value is.
    """
    if bucket[0].is_cuda:
        return torch.stack(torch._foreach_norm(list(bucket), ord=float("inf")))
    return torch.stack([end for tensor in bucket for end in torch.aminmax(tensor)])
