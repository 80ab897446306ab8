"""What a user would write today with torch alone: sort, index, grouped products, index_add.

`torch+compiled` is the same, whole in one graph of torch.compile.
fp8 has a scale for each row (for each feature in weight gradients), quantised by plain compiled
torch in both layouts, and torch's scaled grouped product in all three directions; weights are
quantised when told to.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ep_plugin.commands.bench.case import Case, Contender, Makers, require_cuda
from ep_plugin.commands.bench.floors import Precision
from ep_plugin.commands.bench.peers._compiled import SWITCHES, compiled
from ep_plugin.commands.bench.peers._scaled import scaled_product

E4M3, LARGEST, MULTIPLE = torch.float8_e4m3fn, 448.0, 16
Product = Callable[[Tensor, nn.Parameter, Tensor], Tensor]  # rows, weight [e, out, in], ends


def _swiglu(hidden: Tensor, probs: Tensor) -> Tensor:
    gate, up = hidden.float().chunk(2, dim=1)
    return (F.silu(gate) * up * probs.unsqueeze(1)).to(hidden.dtype)


class TorchMoE(nn.Module):
    """The layer, its two products given."""

    def __init__(self, case: Case, fc1: Product, fc2: Product) -> None:
        super().__init__()
        self.topk, self.num_experts = case.shape.topk, case.shape.experts
        self.router, self.fc1, self.fc2 = (
            nn.Parameter(weight) for weight in (case.router, case.fc1, case.fc2)
        )
        self.products = fc1, fc2
        self.swiglu = compiled(_swiglu) if case.device.type == "cuda" else _swiglu

    def forward(self, tokens: Tensor) -> Tensor:
        """Return [T, H] for `tokens` [T, H]."""
        logits, experts = F.linear(tokens, self.router).float().topk(self.topk, dim=1)
        probs = logits.softmax(dim=1)
        chosen = experts.flatten()
        order = chosen.argsort(stable=True)  # [R]
        counts = chosen.new_zeros(self.num_experts).scatter_add(0, chosen, torch.ones_like(chosen))
        ends, token = counts.cumsum(0, dtype=torch.int32), order // self.topk
        hidden = self.products[0](tokens[token], self.fc1, ends)
        active = self.swiglu(hidden, probs.flatten()[order])
        rows = self.products[1](active, self.fc2, ends)
        return torch.zeros_like(tokens).index_add(0, token, rows)


def _grouped(rows: Tensor, weight: nn.Parameter, ends: Tensor) -> Tensor:
    return torch._grouped_mm(rows, weight.transpose(1, 2), offs=ends)


def _quantized(matrix: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return e4m3 values and the fp32 scale of each slice along `dim`."""
    wide = matrix.float()
    scale = wide.abs().amax(dim=dim, keepdim=True).clamp(min=1e-12) / LARGEST
    return (wide / scale).to(E4M3), scale.squeeze(dim)


class Weight8:
    """A weight [e, out, in] in e4m3, a scale for each output, and transposed, for each input."""

    def __init__(self, weight: Tensor, quantized: Callable[..., tuple[Tensor, Tensor]]) -> None:
        self.weight, self.quantized = weight, quantized
        self.renew()

    def renew(self) -> None:
        """Quantise again, both layouts."""
        self.data, self.scale = self.quantized(self.weight, 2)
        data, self.transposed_scale = self.quantized(self.weight, 1)
        self.transposed = data.transpose(1, 2).contiguous()  # [e, in, out]


class _Product8(torch.autograd.Function):
    """rows [R, in] @ weight transposed in e4m3; gradients likewise."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, ends: Tensor, weight8: Weight8) -> Tensor:
        ctx.save_for_backward(rows, ends)
        ctx.weight8 = weight8
        data, scale = weight8.quantized(rows, 1)
        return scaled_product(data, weight8.data.transpose(1, 2), scale, weight8.scale, ends)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (rows, ends), weight8, grad = ctx.saved_tensors, ctx.weight8, grads[0].contiguous()
        data, scale = weight8.quantized(grad, 1)
        right = weight8.transposed.transpose(1, 2)
        d_rows = scaled_product(data, right, scale, weight8.transposed_scale, ends)
        left, left_scale = _columns(grad, ends, weight8)
        right, right_scale = _columns(rows, ends, weight8)
        d_weight = scaled_product(left, right.T, left_scale, right_scale, _padded_ends(ends))
        return d_rows, d_weight, None, None


def _columns(matrix: Tensor, ends: Tensor, weight8: Weight8) -> tuple[Tensor, Tensor]:
    """Return `matrix` [R, X] transposed in e4m3 [X, P], and a scale for each feature [e * X].

    The product wants each expert's columns to start at a multiple of 16; zeros fill up.
    """
    data, scale = weight8.quantized(matrix, 0)
    padded, target = _padded(ends, len(matrix))
    columns = torch.zeros(padded, matrix.shape[1], dtype=torch.uint8, device=matrix.device)
    columns[target] = data.view(torch.uint8)
    return columns.T.contiguous().view(E4M3), scale.repeat(len(ends))


def _padded_ends(ends: Tensor) -> Tensor:
    counts = torch.diff(ends, prepend=ends.new_zeros(1))
    return ((counts + MULTIPLE - 1) // MULTIPLE * MULTIPLE).cumsum(0, dtype=torch.int32)


def _padded(ends: Tensor, num_rows: int) -> tuple[int, Tensor]:
    """Return enough columns for any counts, and the column of each row [R]."""
    row = torch.arange(num_rows, device=ends.device)
    expert = torch.searchsorted(ends, row, right=True)
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    padded_ends = _padded_ends(ends)
    padded_starts = torch.cat([ends.new_zeros(1), padded_ends[:-1]])
    size = -(-num_rows // MULTIPLE) * MULTIPLE + len(ends) * MULTIPLE
    return size, row + (padded_starts - starts)[expert]


def build(case: Case, precision: Precision) -> Makers:
    """Return what makes the layer; raises BackendUnavailable for fp8 without a GPU."""
    if precision == "bf16":
        whole = {"torch+compiled": partial(_bf16, case, whole=True)}
        return {"torch": partial(_bf16, case)} | (whole if case.device.type == "cuda" else {})
    require_cuda("torch fp8", case.device)
    return {"torch+rowwise": partial(_rowwise, case)}


def _bf16(case: Case, whole: bool = False) -> Contender:
    layer = TorchMoE(case, _grouped, _grouped)
    parameters = list(layer.parameters())
    if not whole:
        return Contender("torch", "bf16", layer, parameters)
    return Contender("torch+compiled", "bf16", compiled(layer), parameters, switches=SWITCHES)


def _rowwise(case: Case) -> Contender:
    quantized = torch.compile(_quantized, dynamic=True)
    kept = [Weight8(weight, quantized) for weight in (case.fc1, case.fc2)]

    def product(weight8: Weight8) -> Product:
        def multiply(rows: Tensor, weight: nn.Parameter, ends: Tensor) -> Tensor:
            result: Tensor = _Product8.apply(rows, weight, ends, weight8)
            return result

        return multiply

    def quantize() -> None:
        for weight8 in kept:
            weight8.renew()

    layer = TorchMoE(case, *(product(weight8) for weight8 in kept))
    return Contender(
        "torch+rowwise",
        "fp8",
        layer,
        list(layer.parameters()),
        quantize=quantize,
    )
