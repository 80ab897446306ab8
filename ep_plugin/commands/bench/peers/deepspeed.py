"""DeepSpeed's AutoEP layer in bf16, its experts on one rank: as it is, and with fused switches.

AutoEP replaces the MoE block of a model; here the block it replaces has a gate and packed experts,
as those of Qwen3-MoE have.
"""

from functools import partial
from typing import Any

import torch
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.module_inject.auto_ep_presets.base import AutoEPConfig, MoELayerSpec
from torch import Tensor, nn

from ep_plugin.commands.bench.case import Case, Contender, Makers
from ep_plugin.commands.bench.floors import Precision

WAYS: dict[str, dict[str, Any]] = {  # of `expert_parallel` in DeepSpeed's configuration
    "deepspeed": {},
    "deepspeed+fused": {"gate_up_impl": "fused", "combine_impl": "fused_weighted_sum"},
}


def build(case: Case, precision: Precision) -> Makers:
    """Return what makes the layer as it is and, on a GPU, fused; it has no fp8."""
    if precision != "bf16":
        return {}
    ways = WAYS if case.device.type == "cuda" else ["deepspeed"]
    return {name: partial(_contender, case, name) for name in ways}


def _block(case: Case) -> Any:
    """Return what AutoEP takes the weights of."""
    block, experts = nn.Module(), nn.Module()
    block.gate = nn.Linear(case.shape.hidden, case.shape.experts, bias=False, device="meta")
    block.gate.weight = nn.Parameter(case.router)
    experts.gate_up_proj, experts.down_proj = nn.Parameter(case.fc1), nn.Parameter(case.fc2)
    block.experts = experts
    return block


def _spec(case: Case) -> MoELayerSpec:
    shape = case.shape
    return MoELayerSpec(
        moe_module_name="mlp",
        model_family="qwen3_moe",
        router_name="gate",
        experts_name="experts",
        expert_storage="fused_3d",
        expert_w1_name="gate_up_proj",
        expert_w2_name="down_proj",
        expert_w3_name=None,
        num_experts=shape.experts,
        top_k=shape.topk,
        hidden_size=shape.hidden,
        ffn_hidden_size=shape.ffn,
        score_func="softmax",
        score_apply="post",
        route_norm=True,
        gate_bias=False,
        return_router_logits=False,
        router_logits_capture_target="none",
        router_logits_capture_index=None,
        router_logits_capture_layer_name=None,
        has_shared_experts=False,
        shared_experts_name="",
    )


def _contender(case: Case, name: str) -> Contender:
    switches = WAYS[name]
    with torch.device(case.device):
        layer: Any = AutoEPMoELayer(
            _spec(case), _block(case), ep_size=1, ep_rank=0, config=AutoEPConfig(**switches)
        )
    layer.to(case.router.dtype).train()

    def forward(tokens: Tensor) -> Tensor:
        output: Tensor = layer(tokens.unsqueeze(0))
        return output.squeeze(0)

    told = ", ".join(f'"{key}": "{value}"' for key, value in switches.items())
    return Contender(name, "bf16", forward, list(layer.parameters()), switches=told)
