"""FP8 products with one scale per row, through torch's scaled grouped GEMM: e4m3 in, bf16 out.

Operands have powers of two as scales (see `ep_plugin.e4m3`): activations, gradients and weights one
per row in forward; transposed weights, and both sides of a weight gradient, one per expert. On the
CPU the same values are multiplied in fp32.
"""

import torch
from torch import Tensor

from ep_plugin.config import ConfigError
from ep_plugin.e4m3 import Columns8, Rows8, Weight8

MULTIPLE = 16  # of every dimension: the product reads 16 bytes at a time


def check(hidden_size: int, ffn_hidden_size: int, device: torch.device) -> None:
    """Raise ConfigError when this recipe has no product for the sizes or the device."""
    for name, size in (("hidden_size", hidden_size), ("ffn_hidden_size", ffn_hidden_size)):
        if size % MULTIPLE:
            raise ConfigError(
                f"fp8 (rowwise) needs {name} on each rank ({size}) to be a multiple of {MULTIPLE}; "
                f"{-(-size // MULTIPLE) * MULTIPLE} or fp8 = off would do"
            )
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0):
        raise ConfigError(
            f"fp8 (rowwise) needs a GPU of compute capability 9.0 (H100) or newer; this is "
            f"{torch.cuda.get_device_name(device)}; fp8 = off would do"
        )


def multiply(rows: Rows8, weight: Weight8, ends: Tensor) -> Tensor:
    """Return `rows` [R, a] times each expert's `weight` transposed: [R, b] bf16."""
    if not rows.data.is_cuda:
        return _multiply_on_cpu(rows, weight, ends)
    return torch._scaled_grouped_mm(
        rows.data,
        weight.data.transpose(1, 2),
        rows.scale,
        weight.scale,
        offs=ends,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )


def multiply_columns(left: Columns8, right: Columns8, ends: Tensor) -> Tensor:
    """Return each expert's `left` [b, P] times `right` [a, P] transposed: [e, b, a] bf16.

    `ends` [e] int32 are the columns at which experts end, multiples of 16.
    """
    if not left.data.is_cuda:
        blocks = [torch.tensor_split(m.data.float(), ends.long(), dim=1) for m in (left, right)]
        products = [b @ a.T for b, a in list(zip(*blocks, strict=True))[:-1]]
        scales = left.scale.unsqueeze(2) * right.scale.unsqueeze(1)
        return (torch.stack(products) * scales).bfloat16()
    return torch._scaled_grouped_mm(
        left.data,
        right.data.T,
        left.scale.flatten(),
        right.scale.flatten(),
        offs=ends,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )


def _multiply_on_cpu(rows: Rows8, weight: Weight8, ends: Tensor) -> Tensor:
    blocks = torch.tensor_split(rows.data.float(), ends.long())
    products = [b @ w.T for b, w in zip(blocks[:-1], weight.data.float(), strict=True)]
    scales = weight.scale.repeat_interleave(torch.diff(ends, prepend=ends.new_zeros(1)), dim=0)
    inside = torch.cat(products) * scales * rows.scale[: len(scales), None]
    rest = inside.new_zeros(len(rows.data) - len(inside), inside.shape[1])
    return torch.cat([inside, rest]).bfloat16()
