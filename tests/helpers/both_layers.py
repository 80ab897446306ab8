"""Megatron's own MoE layer and ours, made with one seed, on the same tokens, on CPU ranks."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from forked import connect
from torch import Tensor

from ep_plugin.megatron.cpu import mode as cpu_mode
from ep_plugin.megatron.edge_settings import EdgeSettings
from ep_plugin.megatron.seams.install import install, uninstall

HIDDEN, LENGTH, SEQUENCES, STEPS = 16, 8, 2, 3


def run_cases(layout: dict[str, int], cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return, for each case, what each of the two layers did on this rank."""
    cpu_mode.enable()
    connect()
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(**layout)
    return {name: [both(layout, settings) for both in BOTH] for name, settings in cases.items()}


def _stock(layout: dict[str, int], settings: dict[str, Any]) -> dict[str, Any]:
    return observe(layout, settings)


def _ours(layout: dict[str, int], settings: dict[str, Any]) -> dict[str, Any]:
    install(EdgeSettings())
    try:
        return observe(layout, settings)
    finally:
        uninstall()
        cpu_mode.enable()


BOTH: tuple[Callable[..., dict[str, Any]], ...] = (_stock, _ours)


def observe(layout: dict[str, int], settings: dict[str, Any]) -> dict[str, Any]:
    """Train the layer that Megatron makes now for some steps; return all that it computed."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    finalize = import_module("megatron.core.distributed.finalize_model_grads")
    tp = layout.get("tensor_model_parallel_size", 1)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=2,
        moe_ffn_hidden_size=8,
        num_moe_experts=8,
        moe_token_dispatcher_type="alltoall",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        use_cpu_initialization=True,
        sequence_parallel=tp > 1,
        tensor_model_parallel_size=tp,
        expert_model_parallel_size=layout.get("expert_model_parallel_size", 1),
        expert_tensor_parallel_size=1,
        init_method_std=0.3,
        **{"moe_router_topk": 2, "moe_router_dtype": "fp32", **settings},
    )
    model_parallel_cuda_manual_seed(7, force_reset_rng=True)
    torch.manual_seed(7)
    spec = get_moe_module_spec(use_te=False, num_experts=8, moe_grouped_gemm=False)
    layer: Any = torch.nn.Module()
    layer.mlp = spec(config=config, layer_number=1)
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(()))
    torch.manual_seed(11 + torch.distributed.get_rank())
    seen: dict[str, list[Any]] = {"output": [], "hidden": [], "router": [], "bias": []}
    dtype = config.params_dtype
    for step in range(STEPS):
        hidden = torch.randn(LENGTH // tp, SEQUENCES, HIDDEN, dtype=dtype).requires_grad_()
        if step == STEPS - 1 and config.moe_expert_capacity_factor is None:
            layer.eval()  # where Megatron drops with a capacity too, and ours does not
        output = layer.mlp(hidden)[0]
        layer.zero_grad()
        output.float().square().mean().backward()
        seen["output"].append(output.detach().float().tolist())
        seen["hidden"].append(gradient(hidden))
        seen["router"].append(gradient(layer.mlp.router.weight))
        if config.moe_router_load_balancing_type == "quantile_balancing" and layer.training:
            group = parallel_state.get_data_parallel_group(with_context_parallel=True)
            finalize._update_router_qb_beta([layer], config, group)
            seen["bias"].append(layer.mlp.router.qb_beta.tolist())
        finalize.reset_model_temporary_tensors(config, [layer])
    return seen


def gradient(tensor: Tensor) -> Any:
    assert tensor.grad is not None
    return tensor.grad.float().tolist()
