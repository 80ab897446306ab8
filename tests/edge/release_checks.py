"""What must hold on every release in a process of its own; `py` forks one for each."""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ep_plugin.errors import ConfigError
from ep_plugin.megatron.cpu import mode as cpu_mode
from ep_plugin.megatron.seams import install as hooks
from ep_plugin.megatron.seams import touchpoints, wheel


def doctor_is_content() -> None:
    """`doctor` names the release and has nothing to object."""
    from ep_plugin.commands.doctor import examine

    (finding,) = [f for f in examine() if f.name == "megatron-core"]
    assert finding.status == "ok", finding.text
    assert finding.text.startswith(touchpoints.installed_version()), finding.text
    assert ("megatron.training" in finding.text) is not touchpoints.has_training()


def a_missing_symbol_is_named() -> None:
    """Without a symbol install refuses with its path, and nothing is changed."""
    release = touchpoints.release_for(touchpoints.installed_version())
    specs: Any = importlib.import_module(hooks.MODULE_SPECS)
    for path in (
        "megatron.core.transformer.moe.moe_utils:get_default_pg_collection",
        release.losses.WRITERS[0],
    ):
        owner, name = touchpoints.find_owner(path)
        symbol, before = getattr(owner, name), specs.MoELayer
        delattr(owner, name)
        with pytest.raises(ConfigError, match=f"{path} is not there"):
            hooks.install()
        setattr(owner, name, symbol)
        assert specs.MoELayer is before
        assert not cpu_mode.active()


def install_leaves_no_trace() -> None:
    """Every seam is hooked once, and put back."""
    release = touchpoints.release_for(touchpoints.installed_version())
    paths = [path for path, _ in hooks._seams(None, release.losses.WRITERS)]
    paths.append(f"{hooks.MODULE_SPECS}:MoELayer")
    assert any("validate_args" in path for path in paths) is touchpoints.has_training()

    def seams() -> list[Any]:
        return [getattr(*touchpoints.find_owner(path)) for path in paths]

    before = seams()
    hooks.install()
    hooked = seams()
    hooks.install()
    assert all(a is b for a, b in zip(seams(), hooked, strict=True))
    assert not any(a is b for a, b in zip(hooked, before, strict=True))
    hooks.uninstall()
    assert all(a is b for a, b in zip(seams(), before, strict=True))


def the_wheel_s_helpers_are_not_made_again() -> None:
    """Megatron runs `make` without a Makefile and exits; with us it does not."""
    datasets: Any = importlib.import_module(wheel.DATASETS)
    with pytest.raises(SystemExit, match="1"):
        datasets.compile_helpers()
    hooks.install()
    datasets.compile_helpers()


def evaluation_drops_nothing() -> None:
    """A full expert drops in training alone; Megatron's own block drops in evaluation too."""
    from core_loop import without_the_plugin
    from core_model import HIDDEN, Case, build, fill, transformer_config
    from forked import one_rank

    model, tokens = Case("one layer"), torch.randn(64, 1, HIDDEN)

    def output(training: bool, **capacity: Any) -> torch.Tensor:
        config = transformer_config(model)
        for name, value in capacity.items():
            setattr(config, name, value)
        block = build(config, None)
        fill(block)
        layer = block.decoder.layers[0].mlp.train(training)
        with torch.no_grad():
            found: torch.Tensor = layer(tokens)[0]
        return found

    without_the_plugin()
    one_rank()
    capacity = {"moe_expert_capacity_factor": 0.5, "moe_token_drop_policy": "probs"}
    assert not torch.allclose(output(False, **capacity), output(False), atol=1e-3)
    hooks.install()
    assert torch.equal(output(False, **capacity), output(False))
    assert not torch.allclose(output(True, **capacity), output(True), atol=1e-3)


CHECKS: dict[str, Callable[[], None]] = {
    "doctor": doctor_is_content,
    "a symbol that is gone": a_missing_symbol_is_named,
    "install and uninstall": install_leaves_no_trace,
    "helpers of the wheel": the_wheel_s_helpers_are_not_made_again,
    "evaluation": evaluation_drops_nothing,
}
