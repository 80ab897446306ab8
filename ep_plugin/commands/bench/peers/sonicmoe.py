"""SonicMoE: bf16, gathers and activations fused into its products."""

from functools import partial

import torch
from sonicmoe import MoE
from sonicmoe.enums import ActivationType
from torch import Tensor

from ep_plugin.commands.bench.case import Case, Contender, Makers, require_cuda
from ep_plugin.commands.bench.floors import Precision


def build(case: Case, precision: Precision) -> Makers:
    """Return what makes its layer, with the auxiliary loss it always computes; it has no fp8."""
    require_cuda("sonicmoe", case.device)
    return {"sonicmoe": partial(_contender, case)} if precision == "bf16" else {}


def _contender(case: Case) -> Contender:
    shape = case.shape
    layer = MoE(
        shape.experts, shape.topk, shape.hidden, shape.ffn, ActivationType.SWIGLU, False, 0.02
    )
    layer = layer.to(torch.bfloat16).cuda().train()
    gate, up = case.fc1.chunk(2, dim=1)
    with torch.no_grad():
        layer.router.weight.copy_(case.router)
        layer.c_fc.weight[:, ::2].copy_(gate)  # it wants rows of gate and up in turn
        layer.c_fc.weight[:, 1::2].copy_(up)
        layer.c_proj.weight.copy_(case.fc2)

    def forward(tokens: Tensor) -> Tensor:
        output: Tensor = layer(tokens)[0]
        return output

    return Contender("sonicmoe", "bf16", forward, list(layer.parameters()))
