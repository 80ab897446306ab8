"""Installing is idempotent, leaves no trace when undone, and refuses an unknown Megatron."""

import argparse
import functools
import importlib
import itertools
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from release_checks import changed, check_no_trace, places, process, standing

from ep_plugin import megatron as edge
from ep_plugin.errors import ConfigError
from ep_plugin.megatron.cpu import mode as cpu_mode
from ep_plugin.megatron.seams import install as hooks
from ep_plugin.megatron.seams import patches as patcher
from ep_plugin.megatron.seams import touchpoints
from ep_plugin.megatron.seams.install import install, uninstall

pytestmark = pytest.mark.megatron
TOUCHPOINTS = tuple(touchpoint.path for touchpoint in touchpoints.verify())


@pytest.fixture
def untouched() -> Iterator[None]:
    """Hold every touch point, before the test and after it, against each other."""
    before, around = standing(TOUCHPOINTS), process()
    yield
    assert changed(before) == set()
    assert process() == around


def test_install_twice_and_uninstall_restores(
    untouched: None, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        check_no_trace()
        assert capsys.readouterr().out.count("hosts Megatron's MoE layers") == 1
        uninstall()
        assert capsys.readouterr().out == ""


def test_what_is_built_is_a_layer_of_megatron_s() -> None:
    from megatron.core.transformer.moe.moe_layer import MoELayer

    place = f"{hooks.MODULE_SPECS}:MoELayer"
    install()
    try:
        installed = standing()[place]
    finally:
        uninstall()
    assert issubclass(installed, MoELayer)
    assert installed is not MoELayer


@pytest.mark.parametrize("step", ["find", "make"])
def test_an_error_at_any_change_leaves_nothing_changed(
    step: str, untouched: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each change in turn cannot be made, until there is none left that fails."""
    checked = touchpoints.verify()
    monkeypatch.setattr(touchpoints, "verify", lambda: checked)
    before, around = standing(TOUCHPOINTS), process()
    left = [0]

    def failing(real: Callable[[Any], None]) -> Callable[[Any], None]:
        def fail(change: Any) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise RuntimeError(f"no {step} of {change.place}")
            real(change)

        return fail

    for kind in ("_Replaced", "_Wrapped", "_Variable", "_Entered", "_AtExit"):
        kind_of_change = getattr(patcher, kind)
        if step in vars(kind_of_change):
            monkeypatch.setattr(kind_of_change, step, failing(vars(kind_of_change)[step]))
    for so_many in itertools.count():
        left[0] = so_many
        try:
            install()
        except RuntimeError:
            assert changed(before) == set()
            assert process() == around
            assert not cpu_mode.active()
        else:
            break
    uninstall()
    assert so_many >= len(places())


@pytest.mark.newest
def test_the_package_says_of_every_seam_why_it_sits_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_mode, "wanted", lambda: False)
    planned = {(place, why) for place, why in hooks.seams() if ":" in place}
    rows = re.findall(r"^    (\w+:\S+)\n        (.+)$", str(edge.__doc__), re.MULTILINE)
    ends = {place: place.rpartition(":")[0].rpartition(".")[0] for place, _ in planned}
    said = {(place.removeprefix(f"{ends[place]}."), why) for place, why in planned}
    assert said <= set(rows)
    assert len(rows) == len(set(rows))
    optional = (
        *("utils:compile_helpers", "distrib_optimizer:DistributedOptimizer."),
        "argument_utils:gpt_config_from_args",  # from 0.19 on
    )
    assert all(place.startswith(optional) for place, _ in set(rows) - said)


def test_cpu_mode_that_was_on_before_an_error_stays_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EP_PLUGIN_DEVICE", "cpu")
    cpu_mode.enable()
    try:
        before = standing()
        with monkeypatch.context() as patch:
            patch.setattr(hooks.wheel, "changes", lambda patches: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                install()
        assert changed(before) == set()
        assert cpu_mode.active()
    finally:
        cpu_mode.disable()


def test_ours_is_around_cpu_mode_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both wrap the same two functions of Megatron."""
    config = importlib.import_module("megatron.core.transformer.transformer_config")
    arguments = importlib.import_module("megatron.training.arguments")
    called: list[str] = []

    def validate_args(args: Any, defaults: Any = None) -> None:
        called.append("megatron")

    monkeypatch.setenv("EP_PLUGIN_DEVICE", "cpu")
    monkeypatch.setattr(arguments, "validate_args", validate_args)
    monkeypatch.setattr(
        config.TransformerConfig, "__post_init__", lambda config: called.append("megatron")
    )

    def inner(original: Callable[[Any], None], value: Any) -> None:
        called.append("CPU mode")
        original(value)

    def outer(layer_class: Any, original: Callable[[Any], None], value: Any) -> None:
        called.append("ours")
        original(value)

    for name in ("_with_cpu_arguments", "_with_kept_outputs"):
        monkeypatch.setattr(cpu_mode, name, inner)
    for name in ("_with_our_checks", "_with_activation"):
        monkeypatch.setattr(hooks, name, outer)
    install()
    try:
        arguments.validate_args(None)
        config.TransformerConfig.__post_init__(None)
    finally:
        uninstall()
    assert called == ["ours", "CPU mode", "megatron"] * 2


def test_another_s_wrapper_stays_and_ours_is_not_there_twice(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments: Any = importlib.import_module("megatron.training.arguments")
    name = "add_megatron_arguments"
    monkeypatch.setattr(arguments, name, getattr(arguments, name))  # put back at the end

    def parser() -> argparse.ArgumentParser:
        filled = getattr(arguments, name)(argparse.ArgumentParser(allow_abbrev=False))
        assert isinstance(filled, argparse.ArgumentParser)
        return filled

    def ours_in(filled: argparse.ArgumentParser) -> bool:
        return "--ep-topk" in filled._option_string_actions

    install()
    below = getattr(arguments, name)

    @functools.wraps(below)
    def theirs(parser: argparse.ArgumentParser) -> Any:
        parser.add_argument("--theirs")
        return below(parser)

    setattr(arguments, name, theirs)
    assert ours_in(parser())
    capsys.readouterr()
    uninstall()
    place = f"megatron.training.arguments:{name} is no longer what ep_plugin put there"
    assert place in capsys.readouterr().out
    assert getattr(arguments, name) is theirs
    assert "--theirs" in parser()._option_string_actions
    assert not ours_in(parser())
    install()
    assert ours_in(parser())
    uninstall()
    assert getattr(arguments, name) is theirs


def test_a_mismatch_is_refused_with_nothing_changed(
    untouched: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = (touchpoints.Touchpoint("megatron.core.transformer.mlp:MLP.gone"),)
    monkeypatch.setattr(hooks.touchpoints, "table_for", lambda version: table)
    with pytest.raises(ConfigError, match=r"MLP\.gone is not there"):
        install()
    assert not cpu_mode.active()


def test_an_unknown_release_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks.touchpoints, "installed_version", lambda: "0.15.3")
    supported = r"0\.16, 0\.17, 0\.18, 0\.19"
    message = rf"megatron-core 0\.15\.3 is none that the plugin knows; supported are {supported}"
    with pytest.raises(ConfigError, match=message):
        install()
    assert not cpu_mode.active()
    with pytest.raises(SystemExit, match="2"):  # what a script with the plugin applied does
        edge.install()


def test_a_foreign_apex_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    with monkeypatch.context() as on_a_gpu:
        on_a_gpu.setattr(cpu_mode, "wanted", lambda: False)
        with pytest.raises(ConfigError, match="is not NVIDIA's"):
            install()
    assert not cpu_mode.active()
    install()  # on the CPU Megatron does not see it
    uninstall()


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
