"""How experts are balanced, forced and filled: outputs and gradients of Megatron's layer."""

from typing import Any

import pytest
import torch
from both_layers import run_cases
from megatron.core.transformer.moe.moe_utils import (
    router_gating_linear,
    topk_routing_with_score_function,
)
from spawn import run_ranks

from ep_plugin import ExpertGroups, MoEConfig, RoutingConfig
from ep_plugin.moe.router.topk import TopKRouter

pytestmark = [pytest.mark.megatron, pytest.mark.newest]
LAYOUTS: dict[str, dict[str, int]] = {
    "ep 2": {"expert_model_parallel_size": 2},
    "tp 2": {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 1},
}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "forced": {"moe_router_force_load_balancing": True},
    "forced, with losses": {
        "moe_router_force_load_balancing": True,
        "moe_aux_loss_coeff": 0.5,
        "moe_z_loss_coeff": 0.1,
    },
    "two losses": {
        "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"],
        "moe_aux_loss_coeff": [0.5, 0.25],
    },
    "one of three losses is off": {
        "moe_router_load_balancing_type": ["global_aux_loss", "seq_aux_loss", "aux_loss"],
        "moe_aux_loss_coeff": [0.0, 0.25, 0.5],
    },
    "padded to a capacity": {
        "moe_expert_capacity_factor": 0.75,
        "moe_pad_expert_input_to_capacity": True,
    },
    "padded to a larger capacity, with a loss": {
        "moe_expert_capacity_factor": 1.5,
        "moe_pad_expert_input_to_capacity": True,
        "moe_aux_loss_coeff": 0.5,
    },
    "quantiles": {"moe_router_load_balancing_type": "quantile_balancing"},
    "quantiles that remember, before softmax": {
        "moe_router_load_balancing_type": "quantile_balancing",
        "moe_router_quantile_balancing_ema": 0.75,
        "moe_router_pre_softmax": True,
        "moe_z_loss_coeff": 0.1,
    },
    "quantiles of sigmoids": {
        "moe_router_load_balancing_type": "quantile_balancing",
        "moe_router_score_function": "sigmoid",
        "moe_router_topk": 3,
    },
}


@pytest.fixture(scope="module", params=LAYOUTS)
def layers(request: pytest.FixtureRequest) -> dict[str, Any]:
    found: dict[str, Any] = run_ranks(2, run_cases, LAYOUTS[request.param], CASES)[0]
    return found


@pytest.mark.parametrize("case", CASES)
def test_it_is_megatron_s(layers: dict[str, Any], case: str) -> None:
    theirs, ours = layers[case]
    assert any(theirs["output"])
    for what, expected in theirs.items():
        for step, (found, right) in enumerate(zip(ours[what], expected, strict=True)):
            torch.testing.assert_close(
                *(torch.tensor(found), torch.tensor(right)),
                rtol=1e-4,
                atol=1e-6,
                msg=lambda said, what=what, step=step: f"{what} of step {step}: {said}",
            )


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalize", ["before_drop", "none"])
def test_a_router_in_the_model_s_dtype_weighs_as_megatron_s_by_default(
    score: str, normalize: str
) -> None:
    """To the digit: choices, and weights as they are rounded to bf16."""
    if (score, normalize) == ("sigmoid", "none"):
        pytest.skip("Megatron divides sigmoids by their sum where a token has several experts")
    routing = RoutingConfig(
        topk=3,
        score_function=score,  # type: ignore[arg-type]
        normalize=normalize,  # type: ignore[arg-type]
        router_dtype="model",
        scaling_factor=2.5,
    )
    config = MoEConfig(hidden_size=64, ffn_hidden_size=8, num_experts=16, routing=routing)
    torch.manual_seed(3)
    router = TopKRouter(config, ExpertGroups(), dtype=torch.bfloat16)
    torch.nn.init.normal_(router.weight, std=0.3)
    hidden = torch.randn(200, 64, dtype=torch.bfloat16)
    ours = router(hidden)
    logits = router_gating_linear(hidden, router.weight, None, torch.bfloat16)
    probs, _ = topk_routing_with_score_function(
        logits,
        3,
        use_pre_softmax=normalize == "none",
        scaling_factor=2.5,
        score_function=score,
    )
    found = torch.zeros_like(probs, dtype=ours.probs.dtype)
    found.scatter_(1, ours.expert_ids, ours.probs)
    assert torch.equal(found, probs.to(found.dtype))
