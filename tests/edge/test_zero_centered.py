"""Norms with weights centred at zero under CPU mode, where Megatron's own refuse them."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from ep_plugin.megatron.cpu.mode import disable, enable

pytestmark = pytest.mark.megatron
H, EPS = 24, 1e-3


def formula(kind: str, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What the norm is, in float64."""
    if kind == "RMSNorm":
        return x / ((x * x).sum(-1, keepdim=True) / H + EPS) ** 0.5 * (1 + weight)
    centred = x - x.sum(-1, keepdim=True) / H
    return (
        centred / ((centred * centred).sum(-1, keepdim=True) / H + EPS) ** 0.5 * (1 + weight) + bias
    )


@pytest.fixture
def cpu_mode(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("EP_PLUGIN_DEVICE", "cpu")
    enable()
    yield
    disable()


@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
def test_a_norm_of_megatron_s_local_layers_is_one_plus_weight(kind: str, cpu_mode: None) -> None:
    """Values and all gradients are the formula's; it begins as the plain norm, and bf16 is rounded
    once.
    """
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=1,
        hidden_size=H,
        num_attention_heads=1,
        normalization=kind,
        layernorm_zero_centered_gamma=True,
    )
    norm: Any = WrappedTorchNorm(config, H, EPS)
    assert config.layernorm_zero_centered_gamma
    parameters = list(norm.parameters())
    assert len(parameters) == {"RMSNorm": 1, "LayerNorm": 2}[kind]
    assert all(p.sequence_parallel is False for p in parameters)
    assert not any(p.any() for p in parameters)
    generator = torch.Generator().manual_seed(1)
    for parameter in parameters:
        parameter.data.copy_(torch.randn(H, generator=generator) / 10)
    x = (torch.randn(5, 3, H, generator=generator) * 3 + 1).requires_grad_()
    seed = torch.randn(5, 3, H, generator=generator)
    exact = [leaf.detach().double().requires_grad_() for leaf in (x, *parameters)]
    weights = (*exact[1:], torch.zeros(H, dtype=torch.float64))[:2]
    expected = formula(kind, exact[0], *weights)
    torch.testing.assert_close(norm(x), expected.float())
    found = torch.autograd.grad(norm(x), (x, *parameters), seed)
    wanted = torch.autograd.grad(expected, exact, seed.double())
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs.float(), rtol=1e-5, atol=1e-5)
    narrow = x.detach().bfloat16()
    assert torch.equal(norm(narrow), norm(narrow.float()).bfloat16())
