"""Liger's fused experts in Triton, bf16, behind a router of plain torch; it brings none."""

from functools import partial

import torch
import torch.nn.functional as F
from liger_kernel.ops import LigerFusedMoEFunction
from torch import Tensor, nn

from ep_plugin.commands.bench.case import Case, Contender, Makers, require_cuda
from ep_plugin.commands.bench.floors import Precision


def build(case: Case, precision: Precision) -> Makers:
    """Return what makes its experts; they have no fp8."""
    require_cuda("liger", case.device)
    return {"liger": partial(_contender, case)} if precision == "bf16" else {}


def _contender(case: Case) -> Contender:
    router, fc1, fc2 = (nn.Parameter(weight) for weight in (case.router, case.fc1, case.fc2))

    def forward(tokens: Tensor) -> Tensor:
        logits, experts = F.linear(tokens, router).float().topk(case.shape.topk, dim=1)
        probs = logits.softmax(dim=1).to(tokens.dtype)
        output: Tensor = LigerFusedMoEFunction.apply(
            tokens, fc1, fc2, experts.to(torch.int32), probs
        )
        return output

    return Contender("liger", "bf16", forward, [router, fc1, fc2])
