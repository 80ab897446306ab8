"""Plain-torch twins of `kernels.activation`: the same functions and rounding, on any device.

Rows past the last expert's belong to absent choices. The kernels do not write them; the twins set
them to zero.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ep_plugin.moe.config import GATED
from ep_plugin.moe.e4m3 import E4M3, Blocks8, Rows8
from ep_plugin.moe.kernels.blocks_torch import dequantize_blocks, quantize_blocks
from ep_plugin.moe.kernels.quantize_torch import dequantize_rows, quantize_rows
from ep_plugin.moe.kernels.types import Scales, Target

QUANTIZE: dict[Scales, Callable[[Tensor], Any]] = {"rows": quantize_rows, "blocks": quantize_blocks}

# GELU by tanh, x (1 + tanh u) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3), is x sigmoid(2 u).
_TANH = 1.5957691216057308  # 2 sqrt(2 / pi)
_TANH_CUBE = 0.07135481627260025  # 0.044715 * _TANH


def _inside(num_rows: int, ends: Tensor) -> Tensor:
    """Whether each row belongs to an expert: [R, 1] bool."""
    return (torch.arange(num_rows, device=ends.device) < ends[-1]).unsqueeze(1)


def _slopes(hidden: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return activation(`hidden`) [R, F] and its derivatives with respect to gate and up."""
    wide = hidden if hidden.dtype == torch.float64 else hidden.float()
    gate, up = wide.chunk(2, dim=1) if activation in GATED else (wide, wide)
    if activation == "swiglu":
        sigma = gate.sigmoid()
        return gate * sigma * up, up * sigma * (1 + gate * (1 - sigma)), gate * sigma
    if activation == "geglu_tanh":
        sigma = (gate * (_TANH + _TANH_CUBE * gate * gate)).sigmoid()
        steep = sigma * (1 - sigma) * (_TANH + 3 * _TANH_CUBE * gate * gate)
        return gate * sigma * up, up * (sigma + gate * steep), gate * sigma
    if activation == "relu":
        return gate.relu(), (gate > 0).to(gate.dtype), gate
    cdf = 0.5 * (1 + torch.erf(gate * 0.7071067811865476))
    slope = cdf + gate * 0.3989422804014327 * torch.exp(-0.5 * gate * gate)
    if activation == "gelu":
        return F.gelu(gate), slope, gate
    return gate * cdf * up, up * slope, gate * cdf


def activate(
    hidden: Tensor,
    probs: Tensor,
    order: Tensor,
    ends: Tensor,
    activation: str,
    scales: Scales | None = None,
) -> Tensor | Rows8 | Blocks8:
    """Return activation(`hidden` [R, F or 2F]) times each row's entry of `probs`: [R, F].

    With `scales` None the dtype is that of `hidden`; otherwise e4m3 with one scale per row, or per
    128 features (F is then a multiple of 128). See the top of `kernels.activation` for shapes.
    """
    value = _slopes(hidden, activation)[0]
    row_probs = probs.flatten()[order].unsqueeze(1).to(value.dtype)
    out = (value * row_probs).to(hidden.dtype)
    out = out.masked_fill(~_inside(len(out), ends), 0)
    return out if scales is None else QUANTIZE[scales](out)


def activate_backward(
    grads: Tensor,
    hidden: Tensor | Rows8 | Blocks8,
    probs: Tensor,
    order: Tensor,
    ends: Tensor,
    activation: str,
    scales: Scales | None = None,
    target: Target | None = None,
) -> tuple[Any, Any, Tensor]:
    """Return the gradient of `hidden`, the recomputed activation [R, F], the gradient of `probs`.

    `grads` [R, F] is the gradient of the activation's output. The first two results are in e4m3 if
    `scales` says so. With a `target` they are written into its larger matrices, and those are
    returned. The gradient of `probs` [N, C] is 0 for absent choices.
    """
    absent = ~_inside(len(grads), ends)
    if isinstance(hidden, Rows8):
        hidden = dequantize_rows(hidden)
    kept = dequantize_blocks(hidden) if isinstance(hidden, Blocks8) else hidden
    value, gate_slope, up_slope = _slopes(kept, activation)
    wide = grads.to(value.dtype)
    weights = probs.flatten()[order].unsqueeze(1).to(value.dtype)
    d_rows = (wide * value).sum(dim=1).masked_fill(absent.squeeze(1), 0)
    d_probs = d_rows.new_zeros(probs.numel()).index_copy(0, order.long(), d_rows).view_as(probs)
    slopes = (gate_slope, up_slope) if activation in GATED else (gate_slope,)
    d_hidden = torch.cat([wide * weights * slope for slope in slopes], dim=1).to(grads.dtype)
    d_hidden = d_hidden.masked_fill(absent, 0)
    out = (value * weights).to(grads.dtype).masked_fill(absent, 0)
    matrices: tuple[Any, Any] = d_hidden, out
    if scales is not None:
        matrices = QUANTIZE[scales](d_hidden), QUANTIZE[scales](out)
    return *(matrices if target is None else _placed(matrices, target, ends)), d_probs


def _placed(matrices: Any, target: Target, ends: Tensor) -> Any:
    """Write the present rows of `matrices` to their places in `target.matrices`; return these."""
    inside = _inside(len(target.at), ends).squeeze(1)
    at = target.at[inside].long()

    def placed(rows: Tensor, found: Tensor | None) -> Tensor:
        if found is None:
            found = rows.new_zeros(target.num_rows, *rows.shape[1:])
        found[at] = rows[inside]
        return found

    results: list[Any] = []
    for rows, found in zip(matrices, target.matrices or (None, None), strict=True):
        if isinstance(rows, Tensor):
            results.append(placed(rows, found))
        else:
            data, scale = (
                (None, None) if found is None else (found.data.view(torch.uint8), found.scale)
            )
            data = placed(rows.data.view(torch.uint8), data)
            results.append(type(rows)(data.view(E4M3), placed(rows.scale, scale)))
    return tuple(results)
