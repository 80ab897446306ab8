"""Initial values are those of the layer whose place ours takes, drawn in its order."""

import importlib.util
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig

from ep_plugin.megatron.block import parameters
from ep_plugin.megatron.seams.install import install, uninstall
from ep_plugin.moe.config import MoEConfig
from ep_plugin.moe.groups import ExpertGroups
from ep_plugin.moe.layer import MoELayer

pytestmark = pytest.mark.megatron
FC1, FC2 = [2 * 8, 16], [16, 8]


class TEGroupedMLP:
    """Bears the name of Megatron's experts over Transformer Engine."""

    def __init__(self, submodules: None) -> None: ...


@pytest.mark.parametrize(
    ("experts", "grouped"),
    [
        (partial(TEGroupedMLP, submodules=None), True),
        (SimpleNamespace(module=TEGroupedMLP, submodules=None), True),  # until 0.16
        (partial(SimpleNamespace), False),
        (None, False),
    ],
)
def test_matrices_are_drawn_in_the_order_of_megatron_s_experts(
    monkeypatch: pytest.MonkeyPatch, experts: Any, grouped: bool
) -> None:
    drawn: list[list[int]] = []
    monkeypatch.setattr(
        parameters,
        "_initialize_affine_weight_gpu",
        lambda matrix, *_, **__: drawn.append(list(matrix.shape)),
    )
    layer = MoELayer(MoEConfig(hidden_size=16, ffn_hidden_size=8, num_experts=2))
    config = SimpleNamespace(
        use_cpu_initialization=False, init_method=None, output_layer_init_method=None
    )
    assert parameters.are_grouped(SimpleNamespace(experts=experts)) is grouped
    parameters.initialize_experts(layer.experts, config, ExpertGroups(), grouped=grouped)
    assert drawn == ([FC1, FC1, FC2, FC2] if grouped else [FC1, FC2, FC1, FC2])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None, reason="no Transformer Engine"
)
@pytest.mark.parametrize("grouped", [True, False])
def test_equal_seeds_give_the_values_of_transformer_engine_s_experts(grouped: bool) -> None:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=64,
        num_attention_heads=2,
        ffn_hidden_size=32,
        moe_ffn_hidden_size=32,
        num_moe_experts=4,
        moe_router_topk=2,
        moe_grouped_gemm=grouped,
        moe_token_dispatcher_type="alltoall",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        bf16=True,
        params_dtype=torch.bfloat16,
    )
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    parallel_state.initialize_model_parallel()
    try:
        theirs = built(config, grouped).experts
        install()
        ours = built(config, grouped).experts
        for name, weight in (("linear_fc1", ours.linear_fc1), ("linear_fc2", ours.linear_fc2)):
            for expert, matrix in enumerate(weight.weight):
                held = (
                    getattr(getattr(theirs, name), f"weight{expert}")
                    if grouped
                    else getattr(theirs.local_experts[expert], name).weight
                )
                assert torch.equal(matrix, held), f"{name} of expert {expert}"
    finally:
        uninstall()
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def built(config: TransformerConfig, grouped: bool) -> Any:
    """Return the layer that Megatron makes now, with the seed of the first."""
    model_parallel_cuda_manual_seed(7, force_reset_rng=True)
    torch.manual_seed(7)
    spec = get_moe_module_spec(use_te=True, num_experts=4, moe_grouped_gemm=grouped)
    return spec(config=config, layer_number=1)
