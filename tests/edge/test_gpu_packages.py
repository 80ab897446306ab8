"""CPU mode where packages of GPUs are installed, as in the containers of a cluster."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, ModuleType

import pytest
from loop import RUN, SCRIPT, SHAPE

from ep_plugin.commands import doctor
from ep_plugin.errors import ConfigError
from ep_plugin.megatron.cpu import gpu_packages
from ep_plugin.megatron.seams.patches import Patches

CLI = ("-m", "ep_plugin.cli")
TRAP = """
import sys
if "--multiprocessing-fork" not in sys.orig_argv:
    raise RuntimeError(__name__ + " was imported")
raise ModuleNotFoundError("of no use to a process that writes files")
"""


@pytest.fixture(autouse=True)
def shown_again() -> Iterator[None]:
    gpu_packages.show_again()
    yield
    gpu_packages.show_again()


def run(traps: Path, *words: str) -> str:
    """Run Python with packages in front that end the process which imports them."""
    path = os.pathsep.join([str(traps), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *words],
        env={**os.environ, "PYTHONPATH": path, "EP_PLUGIN_DEVICE": "cpu", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.megatron
@pytest.mark.newest
def test_no_package_of_gpus_is_imported(tmp_path: Path) -> None:
    traps, dense, experts = tmp_path / "traps", tmp_path / "dense", tmp_path / "experts"
    for name in gpu_packages.NAMES:
        (traps / name).mkdir(parents=True)
        (traps / name / "__init__.py").write_text(TRAP)
    save = ("--train-iters", "1", "--save", str(dense), "--save-interval", "1")
    said = run(traps, "-m", "ep_plugin.run", SCRIPT, *SHAPE, *RUN, *save)
    assert f"CPU mode (gloo, without {', '.join(gpu_packages.NAMES)})" in said
    upcycled = ("--to", str(experts), "--num-experts", "4", "--topk", "2", "--drop-optimizer")
    assert "logits" in run(traps, *CLI, "convert", "--from", str(dense), *upcycled)
    text = ("--prompt", "1 2", "--num-tokens", "2", "--greedy", "--tokenizer", "numbers")
    run(traps, *CLI, "generate", str(experts), *text)


def test_what_is_hidden_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    package, part = ModuleType("apex"), ModuleType("apex.optimizers")
    monkeypatch.setitem(sys.modules, "apex", package)
    monkeypatch.setitem(sys.modules, "apex.optimizers", part)
    for name in [name for name in sys.modules if name.split(".")[0] == "megatron"]:
        monkeypatch.delitem(sys.modules, name)
    engine = sys.modules.get("transformer_engine", "not imported")
    gpu_packages.hide()
    for name in ("apex", "apex.optimizers", "transformer_engine"):
        with pytest.raises(ImportError):
            __import__(name)
    gpu_packages.hide()
    assert gpu_packages.show_again() == []
    assert sys.modules["apex"] is package
    assert sys.modules["apex.optimizers"] is part
    assert sys.modules.get("transformer_engine", "not imported") is engine


def took(package: ModuleType) -> Iterator[tuple[str, object]]:
    """Yield what a module of Megatron can have of a package."""
    yield "itself", package
    yield "a class", type("FusedAdam", (), {"__module__": f"{package.__name__}.optimizers"})
    function = FunctionType(took.__code__, {"__name__": f"{package.__name__}.ops"})
    yield "a function", function


@pytest.mark.parametrize("name", gpu_packages.NAMES)
@pytest.mark.parametrize("kind", [0, 1, 2])
def test_a_megatron_that_took_one_is_refused(
    name: str, kind: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("megatron.core.taken")
    vars(module).update([list(took(ModuleType(name)))[kind]])
    monkeypatch.setitem(sys.modules, "megatron.core.taken", module)
    monkeypatch.setitem(sys.modules, name, ModuleType(name))
    with pytest.raises(ConfigError, match=rf"together with {name},.* -m ep_plugin\.run SCRIPT"):
        gpu_packages.hide()
    assert sys.modules[name] is not None


def test_a_package_that_megatron_did_not_take_is_no_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """A script may import it itself, after Megatron was imported without it."""
    monkeypatch.setitem(sys.modules, "megatron.core", ModuleType("megatron.core"))
    monkeypatch.setitem(sys.modules, "apex", ModuleType("apex"))
    gpu_packages.hide()
    assert sys.modules["apex"] is None


def test_a_hidden_package_is_one_change(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("apex", "apex.optimizers", "apex.contrib"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    patches = Patches()
    gpu_packages.changes(patches)
    assert [place for place, _ in patches.table()] == list(gpu_packages.NAMES)


def test_doctor_names_what_the_cpu_does_not_see(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EP_PLUGIN_DEVICE", "cpu")
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("")
    (tmp_path / "amp_C.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert {"apex", "amp_C"} <= set(gpu_packages.installed())
    gpu_packages.hide()
    there = gpu_packages.installed()
    assert {"apex", "amp_C"} <= set(there)
    assert f"Megatron does not see {', '.join(there)}" in doctor._device().text
