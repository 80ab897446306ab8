"""CPU mode where packages of GPUs are installed, as in the containers of a cluster."""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from loop import RUN, SCRIPT, SHAPE

from ep_plugin.errors import ConfigError
from ep_plugin.megatron.cpu import gpu_packages

CLI = ("-m", "ep_plugin.cli")
TRAP = """
import sys
if "--multiprocessing-fork" not in sys.orig_argv:
    raise RuntimeError(__name__ + " was imported")
raise ModuleNotFoundError("of no use to a process that writes files")
"""


@pytest.fixture(autouse=True)
def shown_again() -> None:
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
def test_no_package_of_gpus_is_imported(tmp_path: Path) -> None:
    traps, dense, experts = tmp_path / "traps", tmp_path / "dense", tmp_path / "experts"
    for name in gpu_packages.NAMES:
        (traps / name).mkdir(parents=True)
        (traps / name / "__init__.py").write_text(TRAP)
    save = ("--train-iters", "1", "--save", str(dense), "--save-interval", "1")
    run(traps, "-m", "ep_plugin.run", SCRIPT, *SHAPE, *RUN, *save)
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
    gpu_packages.hide()
    for name in ("apex", "apex.optimizers", "transformer_engine"):
        with pytest.raises(ImportError):
            __import__(name)
    gpu_packages.hide()
    assert gpu_packages.show_again() == []
    assert sys.modules["apex"] is package
    assert sys.modules["apex.optimizers"] is part
    assert "transformer_engine" not in sys.modules


def test_a_megatron_that_took_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apex", ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "megatron.core", ModuleType("megatron.core"))
    with pytest.raises(ConfigError, match=r"together with apex.* python -m ep_plugin\.run SCRIPT"):
        gpu_packages.hide()
    assert sys.modules["apex"] is not None
