"""Installing is idempotent, leaves no trace when undone, and refuses an unknown Megatron."""

import importlib
import subprocess
import sys
from typing import Any

import pytest

from ep_plugin.config import ConfigError
from ep_plugin.megatron import cpu, hooks, install, touchpoints, uninstall

pytestmark = pytest.mark.megatron
SEAMS = (
    "megatron.core.models.gpt.moe_module_specs:MoELayer",
    "megatron.training.arguments:add_megatron_arguments",
    "megatron.training.arguments:validate_args",
    "megatron.core.transformer.moe.moe_logging:MoEMetricsTracker.report",
    "megatron.core.datasets.utils:compile_helpers",
)


def seams() -> list[Any]:
    found = []
    for path in SEAMS:
        module, _, attributes = path.partition(":")
        symbol: Any = importlib.import_module(module)
        for attribute in attributes.split("."):
            symbol = getattr(symbol, attribute)
        found.append(symbol)
    return found


def test_install_twice_and_uninstall_restores(capsys: pytest.CaptureFixture[str]) -> None:
    before = seams()
    try:
        install()
        hooked = seams()
        install()
        assert all(a is b for a, b in zip(seams(), hooked, strict=True))
        assert not any(a is b for a, b in zip(hooked, before, strict=True))
        from megatron.core.transformer.moe.moe_layer import MoELayer

        assert issubclass(hooked[0], MoELayer)
        assert "hosts Megatron's MoE layers" in capsys.readouterr().out
    finally:
        uninstall()
    assert all(a is b for a, b in zip(seams(), before, strict=True))
    uninstall()


def test_a_mismatch_is_refused_with_nothing_hooked(monkeypatch: pytest.MonkeyPatch) -> None:
    before = seams()
    table = (touchpoints.Touchpoint("megatron.core.transformer.mlp:MLP.gone"),)
    monkeypatch.setattr(hooks.touchpoints, "table_for", lambda version: table)
    try:
        with pytest.raises(ConfigError, match=r"MLP\.gone is not there"):
            install()
    finally:
        cpu.disable()
    assert all(a is b for a, b in zip(seams(), before, strict=True))


def test_importing_the_package_hooks_nothing() -> None:
    code = (
        "import sys, ep_plugin; assert 'megatron' not in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
