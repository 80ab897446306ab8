"""VeOmni's fused experts in Triton, bf16, behind a router of plain torch; it brings none.

Its package imports names of transformers that the newest releases no longer have.
"""

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn
from veomni.ops.kernels.moe.group_gemm import group_gemm_fused_moe_forward

from ep_plugin.commands.bench.case import Case, Contender, Makers, require_cuda
from ep_plugin.commands.bench.floors import Precision


def build(case: Case, precision: Precision) -> Makers:
    """Return what makes its experts; they have no fp8."""
    require_cuda("veomni", case.device)
    return {"veomni": partial(_contender, case)} if precision == "bf16" else {}


def _contender(case: Case) -> Contender:
    router, fc1, fc2 = (nn.Parameter(weight) for weight in (case.router, case.fc1, case.fc2))

    def forward(tokens: Tensor) -> Tensor:
        logits, experts = F.linear(tokens, router).float().topk(case.shape.topk, dim=1)
        probs = logits.softmax(dim=1).to(tokens.dtype)
        output: Tensor = group_gemm_fused_moe_forward(
            case.shape.experts, probs, experts, tokens, None, None, fc2, fc1_1_2_weight=fc1
        )
        return output

    return Contender("veomni", "bf16", forward, [router, fc1, fc2])
