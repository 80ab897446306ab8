"""The top-k router against float64 formulas written another way."""

from dataclasses import replace

import pytest
import torch
from tolerance import assert_close
from torch import Tensor

from ep_plugin import ConfigError, ExpertGroups, MoEConfig, RoutingConfig
from ep_plugin.moe.router.topk import TopKRouter

E, H = 3, 3
ROUTING = RoutingConfig(topk=2, router_dtype="fp64")
# An identity gate makes the hidden vectors the logits.
LOGITS = torch.tensor(
    [[2, 1, 0], [2, 0, 1], [3, 1, 0], [0, 2, 1], [2.5, 0.5, 0], [0, 1, 2]], dtype=torch.float64
)


def layer_config(routing: RoutingConfig) -> MoEConfig:
    return MoEConfig(hidden_size=H, ffn_hidden_size=4, num_experts=E, routing=routing)


def identity_router(routing: RoutingConfig) -> TopKRouter:
    router = TopKRouter(layer_config(routing), ExpertGroups(), dtype=torch.float64)
    with torch.no_grad():
        router.weight.copy_(torch.eye(E))
    return router


def test_chosen_probs_sum_to_one() -> None:
    routing = identity_router(ROUTING)(LOGITS)
    assert routing.expert_ids[0].tolist() == [0, 1]
    assert routing.expert_ids[3].tolist() == [1, 2]
    assert routing.tokens_per_expert.tolist() == [4, 5, 3]
    expected = torch.tensor([0.731058578630, 0.268941421370], dtype=torch.float64)
    assert_close(routing.probs[0], expected, torch.float64)


def test_without_normalisation_probs_are_the_softmax_over_all() -> None:
    routing = identity_router(replace(ROUTING, topk=1, normalize="none"))(LOGITS)
    full = LOGITS.exp() / LOGITS.exp().sum(1, keepdim=True)
    assert_close(routing.probs[:, 0], full.max(1).values, torch.float64)


@pytest.mark.parametrize(("topk", "expected"), [(1, 1.293937), (2, 1.004830)])
def test_load_balancing_loss_is_the_published_number(topk: int, expected: float) -> None:
    router = identity_router(replace(ROUTING, topk=topk, aux_loss_coeff=0.5, normalize="none"))
    loss = router(LOGITS).losses["load_balancing_loss"]
    assert float(loss) == pytest.approx(expected, abs=1e-6)


def test_z_loss_is_the_published_number() -> None:
    loss = identity_router(replace(ROUTING, z_loss_coeff=0.5))(LOGITS).losses["z_loss"]
    assert float(loss) == pytest.approx(6.751094, abs=1e-6)


def test_losses_reach_the_gradient_with_their_coefficients() -> None:
    routing = replace(ROUTING, aux_loss_coeff=0.3, z_loss_coeff=0.2)
    router = identity_router(routing)
    cotangent = torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (router(LOGITS).probs * cotangent).sum().backward()
    weight = torch.eye(E, dtype=torch.float64).requires_grad_()
    logits = LOGITS @ weight.T
    probs = logits.exp() / logits.exp().sum(1, keepdim=True)
    ids = logits.argsort(1, descending=True)[:, :2]
    chosen = probs.gather(1, ids)
    counts = torch.zeros(6, E, dtype=torch.float64).scatter(1, ids, 1.0).mean(0) / 2
    total = (chosen / chosen.sum(1, keepdim=True) * cotangent).sum()
    total = total + 0.3 * E * (counts * probs.mean(0)).sum()
    total = total + 0.2 * (logits.exp().sum(1).log() ** 2).mean()
    total.backward()
    assert router.weight.grad is not None
    assert weight.grad is not None
    assert_close(router.weight.grad, weight.grad, torch.float64)


def test_evaluation_has_no_losses() -> None:
    router = identity_router(replace(ROUTING, aux_loss_coeff=1.0, z_loss_coeff=1.0)).eval()
    assert not router(LOGITS).losses
    with torch.no_grad():
        assert not router.train()(LOGITS).losses


def test_bf16_tokens_are_scored_in_fp32() -> None:
    config = layer_config(replace(ROUTING, router_dtype="fp32"))
    router = TopKRouter(config, ExpertGroups(), dtype=torch.bfloat16)
    with torch.no_grad():
        router.weight.copy_(torch.eye(E))
    routing = router(LOGITS.bfloat16())
    assert routing.probs.dtype == torch.float32
    assert_close(routing.probs[0], torch.tensor([0.7310586, 0.2689414]), torch.float32)


def test_no_tokens() -> None:
    router = identity_router(replace(ROUTING, aux_loss_coeff=1.0, z_loss_coeff=1.0))
    routing = router(LOGITS[:0].requires_grad_())
    routing.probs.sum().backward()
    assert routing.probs.shape == (0, 2)
    grad: Tensor | None = router.weight.grad
    assert grad is not None
    assert grad.abs().sum() == 0


def test_top_k_above_the_number_of_experts_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"topk \(4\) must be at most num_experts \(3\)"):
        layer_config(replace(ROUTING, topk=4))
