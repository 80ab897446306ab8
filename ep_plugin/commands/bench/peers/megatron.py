"""Megatron's own MoE layer over Transformer Engine's grouped products, its experts on all ranks.

As its users get it (`+defaults`), and with each switch that its documents name as faster: see
`WAYS`. What Transformer Engine reads from the environment is in the name too, as `+cutlass`.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformer_engine.pytorch  # noqa: F401  Megatron without it is another, slower layer
from megatron.core import parallel_state
from megatron.core.config import set_experimental_flag
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from ep_plugin.commands.bench.case import Case, Contender, Makers, require_cuda
from ep_plugin.commands.bench.floors import Precision
from ep_plugin.commands.bench.peers import _te_switches
from ep_plugin.commands.bench.peers._megatron_ways import Way, ways


def build(case: Case, precision: Precision) -> Makers:
    """Return what makes the layer for each of Megatron's ways of `precision`."""
    require_cuda("megatron", case.device)
    _start()
    return {
        _name(way): partial(_contender, case, way) for way in ways(precision, dist.get_world_size())
    }


def _name(way: Way) -> str:
    return _te_switches.named("+".join(filter(None, ("megatron", way.name))))


def _start() -> None:
    """Make the process groups that Megatron looks up; one rank where no other was started."""
    if not dist.is_initialized():
        dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    if not parallel_state.is_initialized():
        parallel_state.initialize_model_parallel(expert_model_parallel_size=dist.get_world_size())
        model_parallel_cuda_manual_seed(1)


def _config(case: Case, way: Way) -> TransformerConfig:
    shape = case.shape
    return TransformerConfig(
        num_layers=1,
        hidden_size=shape.hidden,
        num_attention_heads=max(1, shape.hidden // 128),
        ffn_hidden_size=shape.ffn,
        moe_ffn_hidden_size=shape.ffn,
        num_moe_experts=shape.experts,
        moe_router_topk=shape.topk,
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=0.01,
        moe_grouped_gemm=True,
        gated_linear_unit=True,
        activation_func=F.silu,
        bias_activation_fusion=True,
        add_bias_linear=False,
        expert_model_parallel_size=dist.get_world_size(),
        bf16=True,
        params_dtype=torch.bfloat16,
        **{"moe_token_dispatcher_type": "alltoall", **way.settings},
    )


def _contender(case: Case, way: Way) -> Contender:
    config = _config(case, way)
    spec = get_moe_module_spec(use_te=True, num_experts=case.shape.experts, moe_grouped_gemm=True)
    layer: Any = spec(config=config, layer_number=1)
    layer.cuda().train()
    layer.set_layer_number(1)
    _copy_weights(case, layer)

    def forward(tokens: Tensor) -> Tensor:
        context: AbstractContextManager[None] = get_fp8_context(config, 0)
        with context, _experimental(way.experimental):
            output: Tensor = layer(tokens.unsqueeze(1))[0]
        return output.squeeze(1)

    linears = layer.experts.linear_fc1, layer.experts.linear_fc2

    def fuse(added: bool) -> list[Any]:
        for linear in linears:
            linear.fuse_wgrad_accumulation = added
        return [weight for linear in linears for weight in linear.parameters()]

    return Contender(
        _name(way),
        way.precision,
        forward,
        list(layer.parameters()),
        renew=layer.set_is_first_microbatch if way.precision == "fp8" else None,
        fuse=fuse,
        dispatcher=way.dispatcher,
        switches=", ".join(filter(None, (way.switches, _te_switches.told()))),
    )


@contextmanager
def _experimental(on: bool) -> Iterator[None]:
    """Set Megatron's switch, which it reads in each forward."""
    set_experimental_flag(on)
    try:
        yield
    finally:
        set_experimental_flag(False)


@torch.no_grad()
def _copy_weights(case: Case, layer: Any) -> None:
    layer.router.weight.copy_(case.router)
    mine = case.experts_of(dist.get_rank(), dist.get_world_size())
    for linear, weights in (
        (layer.experts.linear_fc1, case.fc1),
        (layer.experts.linear_fc2, case.fc2),
    ):
        for index, weight in enumerate(weights[mine]):
            getattr(linear, f"weight{index}").copy_(weight)
