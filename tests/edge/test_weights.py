"""The experts' weights are current whenever they are read, however Megatron brings them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from loop import MOE, OURS, train

from ep_plugin.commands.report.events import Run
from ep_plugin.errors import ConfigError
from ep_plugin.megatron.seams.install import install, uninstall
from ep_plugin.moe.config import MoEConfig
from ep_plugin.moe.layer import MoELayer

pytestmark = pytest.mark.megatron
FP8 = ("--ep-fp8", "rowwise", "--train-iters", "6")
SHARDED = ("--use-distributed-optimizer", "--overlap-grad-reduce", "--ddp-bucket-size", "2000")


def losses(run: Run) -> list[float]:
    return [value for _, value in run.scalars["lm loss"]]


def test_gathering_under_the_forward_changes_nothing(tmp_path: Path) -> None:
    """Data parallel ranks gather updated weights late: the fused experts wait for them."""
    plain = train(2, OURS, tmp_path / "plain", *MOE, *FP8, *SHARDED)
    late = train(2, OURS, tmp_path / "late", *MOE, *FP8, *SHARDED, "--overlap-param-gather")
    assert losses(late) == pytest.approx(losses(plain), rel=1e-6)


def test_gradients_are_summed_in_megatron_s_buffers_over_micro_batches(tmp_path: Path) -> None:
    """As one micro-batch or as four, with what DDP does at the end of each step."""
    flags = (*MOE, *FP8, "--ep-fp8-wgrad", "bf16", "--moe-aux-loss-coeff", "0", *SHARDED)
    runs = [
        train(2, OURS, tmp_path / size, *flags, "--micro-batch-size", size) for size in ("1", "4")
    ]
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=1e-5)
    norms = [[value for _, value in run.scalars["grad-norm"]] for run in runs]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_ddp_is_told_what_its_buffers_hold() -> None:
    from ep_plugin.megatron.block.parameters import MainGrads

    config = MoEConfig(hidden_size=32, ffn_hidden_size=32, num_experts=4, fp8="rowwise")
    layer, tokens = MoELayer(config), torch.randn(8, 32)
    layer(tokens).sum().backward()
    weights: list[Any] = [layer.experts.linear_fc1.weight, layer.experts.linear_fc2.weight]
    plain = [weight.grad for weight in weights]
    layer.experts.totals = MainGrads(layer.experts)
    for dtype in (torch.float32, torch.bfloat16):
        for weight in weights:
            weight.grad, weight.grad_added_to_main_grad = None, False
            weight.main_grad = torch.zeros_like(weight, dtype=dtype)
        layer(tokens).sum().backward()
        for weight, expected in zip(weights, plain, strict=True):
            in_fp32 = dtype == torch.float32  # a buffer in bf16 is left to DDP
            assert weight.grad_added_to_main_grad is in_fp32
            assert weight.grad.shape == weight.shape  # DDP asks whether there is one
            found = weight.main_grad if in_fp32 else weight.grad
            assert float((found - expected).norm() / expected.norm()) < 2**-8


def test_weights_are_quantised_once_a_step_under_megatron_s_schedules(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ep_plugin.moe.experts.fp8 import rowwise

    made: list[Any] = []
    real = rowwise.prepare
    monkeypatch.setattr(rowwise, "prepare", lambda *w: made.append(w) or real(*w))
    layer = MoELayer(MoEConfig(hidden_size=32, ffn_hidden_size=32, num_experts=4, fp8="rowwise"))
    tokens = torch.randn(8, 32)
    layer(tokens)
    layer(tokens)
    assert len(made) == 2  # nobody says when a step begins
    try:
        install()
        from megatron.core.transformer.module import MegatronModule
        from megatron.core.transformer.transformer_config import TransformerConfig

        model = MegatronModule(
            TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=2)
        )
        model.layer = layer
        for _ in range(2):
            model.set_is_first_microbatch()
            layer(tokens)
            layer(tokens)
    finally:
        uninstall()
    assert len(made) == 4


def test_megatron_s_fp8_flags_choose_a_recipe() -> None:
    from megatron.core.transformer.transformer_config import TransformerConfig

    from ep_plugin.megatron.settings import EdgeSettings, moe_config

    def recipe(fp8_recipe: Any, settings: EdgeSettings, **more: Any) -> MoEConfig:
        config = TransformerConfig(
            num_layers=1,
            hidden_size=128,
            num_attention_heads=2,
            num_moe_experts=4,
            gated_linear_unit=True,
            activation_func=torch.nn.functional.silu,
            add_bias_linear=False,
            **more,
        )
        config.fp8, config.fp8_recipe = "hybrid", fp8_recipe  # Megatron wants TE to be there
        return moe_config(config, settings)

    assert recipe("delayed", EdgeSettings()).fp8 == "rowwise"
    assert recipe("tensorwise", EdgeSettings()).fp8 == "rowwise"
    assert recipe("blockwise", EdgeSettings(fp8_wgrad="bf16")).fp8_wgrad == "bf16"
    assert recipe("blockwise", EdgeSettings()).fp8 == "blockwise"
    assert recipe("blockwise", EdgeSettings(fp8="off")).fp8 == "off"
    with pytest.raises(
        ConfigError, match=r"fp8_recipe=mxfp8 has no counterpart.*--ep-fp8 rowwise, blockwise"
    ):
        recipe("mxfp8", EdgeSettings())
    assert not recipe("delayed", EdgeSettings()).deterministic
    assert recipe("delayed", EdgeSettings(deterministic=True)).deterministic
    assert recipe("delayed", EdgeSettings(), deterministic_mode=True).deterministic
