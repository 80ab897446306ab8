"""Installing is idempotent, leaves no trace when undone, and refuses an unknown Megatron."""

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ep_plugin import megatron as edge
from ep_plugin.errors import ConfigError
from ep_plugin.megatron.cpu import mode as cpu_mode
from ep_plugin.megatron.seams import install as hooks
from ep_plugin.megatron.seams import touchpoints
from ep_plugin.megatron.seams.install import install, uninstall

pytestmark = pytest.mark.megatron
SEAMS = (
    "megatron.core.models.gpt.moe_module_specs:MoELayer",
    "megatron.training.arguments:add_megatron_arguments",
    "megatron.training.arguments:validate_args",
    *touchpoints.release_for(touchpoints.installed_version()).losses.WRITERS,
    "megatron.core.transformer.module:MegatronModule.set_is_first_microbatch",
    "megatron.core.datasets.utils:compile_helpers",
    "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.load_state_dict",
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


def test_a_mismatch_is_refused_with_nothing_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    before = seams()
    table = (touchpoints.Touchpoint("megatron.core.transformer.mlp:MLP.gone"),)
    monkeypatch.setattr(hooks.touchpoints, "table_for", lambda version: table)
    with pytest.raises(ConfigError, match=r"MLP\.gone is not there"):
        install()
    assert all(a is b for a, b in zip(seams(), before, strict=True))
    assert not cpu_mode.active()


def test_an_unknown_release_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks.touchpoints, "installed_version", lambda: "0.15.3")
    supported = r"0\.16, 0\.17, 0\.18, 0\.19"
    message = rf"megatron-core 0\.15\.3 has no touch-point table; supported are {supported}"
    with pytest.raises(ConfigError, match=message):
        install()
    assert not cpu_mode.active()
    with pytest.raises(SystemExit, match="2"):  # what a script with the plugin applied does
        edge.install()


def test_a_foreign_apex_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="is not NVIDIA's"):
        install()
    assert not cpu_mode.active()


def test_importing_the_package_hooks_nothing() -> None:
    code = (
        "import sys, ep_plugin; assert 'megatron' not in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


LOGS_AT_THE_END = """
from ep_plugin.megatron.seams.install import install
install()
from megatron.training import global_vars
class Buffered:  # holds back what a thread may not have written when the process ends
    held = []
    def add_scalar(self, *scalar): self.held.append(scalar)
    def flush(self): print("written", *self.held.pop())
global_vars._GLOBAL_TENSORBOARD_WRITER = Buffered()
global_vars.get_tensorboard_writer().add_scalar("lm loss validation", 4.5, 6)
"""


@pytest.mark.newest
def test_what_is_logged_last_is_written() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOGS_AT_THE_END], capture_output=True, text=True, check=True
    )
    assert done.stdout.endswith("written lm loss validation 4.5 6\n")
