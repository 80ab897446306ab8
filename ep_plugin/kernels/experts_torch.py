"""Plain-torch twins of `kernels.experts`: the same functions, the same rounding, any device.

Where the kernels leave rows behind the last expert's as they are, the twins hold zeros.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ep_plugin.config import GATED
from ep_plugin.e4m3 import E4M3, Blocks8, Columns8, Rows8, Weight8, dequantize_rows, quantize_rows
from ep_plugin.kernels import Target
from ep_plugin.kernels.blocks_torch import (
    dequantize_blocks,
    quantize_blocks,
    round_columns,
    round_rows,
    round_weight,
    spread_blocks,
)
from ep_plugin.permute import plan_rows

__all__ = [  # as they are elsewhere
    "quantize_blocks",
    "quantize_rows",
    "round_columns",
    "round_rows",
    "round_weight",
    "spread_blocks",
]
TILE, ALIGN = 128, 16
# GELU by tanh, x (1 + tanh u) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3), is x sigmoid(2 u).
_TANH = 1.5957691216057308  # 2 sqrt(2 / pi)
_TANH_CUBE = 0.07135481627260025  # 0.044715 of that


def _inside(num_rows: int, ends: Tensor) -> Tensor:
    """Whether each row belongs to an expert: [R, 1] bool."""
    return (torch.arange(num_rows, device=ends.device) < ends[-1]).unsqueeze(1)


def sort_choices(expert_ids: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Return the flat choice of each row [R] and the row of each choice [N, C], int32.

    A stable counting sort of `expert_ids` [N, C]; absent choices, -1, come last. `ends` [e] int32
    is the row behind each expert's last.
    """
    plan = plan_rows(expert_ids, len(ends))
    return plan.order.int(), plan.place.int()


def spread_rows(
    tokens: Tensor,
    place: Tensor,
    ends: Tensor,
    num_rows: int | None = None,
    into: Tensor | None = None,
) -> Tensor:
    """Return the token of `tokens` [N, X] of each row, rows at `place` [N, C]: [R, X].

    R is `num_rows`, at least the last of `ends`, or N * C. Rows of other tokens stay as they are
    in `into`, where that is given.
    """
    num_tokens, choices = place.shape
    if into is None:
        size = num_tokens * choices if num_rows is None else num_rows
        into = tokens.new_zeros(size, tokens.shape[1])
    at = place.flatten()
    present = at < ends[-1]
    into[at[present].long()] = tokens.repeat_interleave(choices, dim=0)[present]
    return into


def spread_rows8(tokens: Rows8, place: Tensor, ends: Tensor, num_rows: int | None = None) -> Rows8:
    """Do as `spread_rows` for tokens in e4m3."""
    planned = place, ends, num_rows
    data = spread_rows(tokens.data.view(torch.uint8), *planned).view(E4M3)
    return Rows8(data, spread_rows(tokens.scale.unsqueeze(1), *planned).squeeze(1))


def sum_rows(rows: Tensor, place: Tensor, ends: Tensor) -> Tensor:
    """Return the sums in fp32 of each token's rows [R, X], absent choices left out: [N, X]."""
    wide = rows if rows.dtype == torch.float64 else rows.float()
    absent = place >= ends[-1]
    if not len(rows):
        return rows.new_zeros(len(place), rows.shape[1])
    chosen = wide[place.masked_fill(absent, 0)].masked_fill(absent.unsqueeze(-1), 0)  # [N, C, X]
    return chosen.sum(dim=1).to(rows.dtype)


def _slopes(hidden: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return the activation [R, F] of `hidden` and its slopes with respect to gate and up."""
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
    fp8: bool,
    blocks: bool = False,
) -> Tensor | Rows8:
    """Return activation(`hidden` [R, F or 2F]) times each row's of `probs` [N, C]: [R, F].

    In e4m3 when asked; with `blocks` rounded to it by 128 columns, and F a multiple of 128.
    """
    value = _slopes(hidden, activation)[0]
    row_probs = probs.flatten()[order].unsqueeze(1).to(value.dtype)
    out = (value * row_probs).to(hidden.dtype)
    out = out.masked_fill(~_inside(len(out), ends), 0)
    if blocks:
        return round_rows(out, ends)
    return quantize_rows(out) if fp8 else out


def activate_backward(
    grads: Tensor,
    hidden: Tensor | Rows8 | Blocks8,
    probs: Tensor,
    order: Tensor,
    ends: Tensor,
    activation: str,
    fp8: bool,
    target: Target | None = None,
) -> tuple[Tensor | Rows8, Tensor | Rows8, Tensor]:
    """Return gradients of `hidden` [R, F or 2F], the activation [R, F] again, those of `probs`.

    `grads` [R, F] are the activation's. The first two are in e4m3 when asked, and rows of larger
    matrices with a `target`.
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
    matrices = (quantize_rows(d_hidden), quantize_rows(out)) if fp8 else (d_hidden, out)
    return *(matrices if target is None else _placed(matrices, target, ends)), d_probs


def _placed(matrices: Any, target: Target, ends: Tensor) -> Any:
    """Return `target` 's matrices with the present rows of `matrices` in their places."""
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
            results.append(Rows8(data.view(E4M3), placed(rows.scale, scale)))
    return tuple(results)


def pad_columns(num_rows: int, ends: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the row of each column [P] or -1, its expert [P], and the padded ends [e], int32.

    Each expert's rows are padded to a multiple of ALIGN columns; P is enough for any counts.
    """
    num_experts = len(ends)
    counts = torch.diff(ends, prepend=ends.new_zeros(1))
    padded = (counts + ALIGN - 1) // ALIGN * ALIGN
    padded_ends = padded.cumsum(0, dtype=torch.int32)
    size = -(-(num_rows + num_experts * (ALIGN - 1)) // TILE) * TILE
    column = torch.arange(size, dtype=torch.int32, device=ends.device)
    bucket = torch.searchsorted(padded_ends, column, right=True)
    expert = bucket.where(bucket < num_experts, 0)
    row = column - (padded_ends - padded)[expert] + (ends - counts)[expert]
    there = (bucket < num_experts) & (row < ends[expert])
    return row.where(there, -1).int(), expert.int(), padded_ends


def transpose_rows(
    rows: Rows8, columns: tuple[Tensor, Tensor, Tensor], order: Tensor, ends: Tensor, choices: int
) -> Columns8:
    """Return `rows` transposed and padded as `columns` says, an expert's largest scale for all.

    `choices` 0 says that `rows` are rows; else they are tokens with so many choices each.
    """
    row_of, expert_of, _ = columns
    width = rows.data.shape[1]
    if not len(rows.data):  # columns are padding alone
        empty = torch.zeros(width, len(row_of), device=ends.device).to(E4M3)
        return Columns8(empty, torch.ones(len(ends), width, device=ends.device))
    there = row_of >= 0
    source = row_of.clamp(min=0).long()
    source = order[source] // choices if choices else source
    scale = torch.where(there, rows.scale[source], 0.0)  # [P]
    largest = scale.new_zeros(len(ends)).scatter_reduce(0, expert_of.long(), scale, "amax")
    largest = torch.where(largest > 0, largest, 1.0)
    ratio = scale / largest[expert_of]
    moved = (rows.data.float()[source] * ratio.unsqueeze(1)).masked_fill(~there.unsqueeze(1), 0)
    data = moved.to(E4M3).T.contiguous()
    return Columns8(data, largest.unsqueeze(1).repeat(1, width))


def quantize_weight(weight: Tensor) -> tuple[Weight8, Weight8]:
    """Return `weight` [e, b, a] in e4m3 and its transpose [e, a, b], one scale for each expert."""
    num_experts, num_rows, width = weight.shape
    rows = quantize_rows(weight.reshape(-1, width))
    scale = rows.scale.view(num_experts, num_rows)
    data = rows.data.view(weight.shape)
    largest = scale.amax(dim=1)
    moved = data.float() * (scale / largest.unsqueeze(1)).unsqueeze(2)
    transposed = moved.transpose(1, 2).contiguous().to(E4M3)
    return Weight8(data, scale), Weight8(transposed, largest.unsqueeze(1).repeat(1, width))


def add_wgrad(total: Tensor, left: Tensor, right: Tensor, ends: Tensor) -> None:
    """Add each expert's `left` [R, b] transposed times `right` [R, a] to `total` [e, b, a] fp32."""
    blocks = [torch.tensor_split(m.float(), ends.tolist())[:-1] for m in (left, right)]
    for matrix, x, y in zip(total, *blocks, strict=True):
        matrix += x.T @ y


def add_wgrad8(total: Tensor, left: Columns8, right: Columns8, ends: Tensor) -> None:
    """Add each expert's `left` [b, P] times `right` [a, P] transposed to `total` [e, b, a] fp32."""
    blocks = [torch.tensor_split(m.data.float(), ends.tolist(), dim=1)[:-1] for m in (left, right)]
    scales = left.scale[:, :1] * right.scale[:, :1]  # [e, 1]
    for matrix, scale, x, y in zip(total, scales, *blocks, strict=True):
        matrix += (x @ y.T) * scale
