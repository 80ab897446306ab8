"""Megatron's compiled helper: what a checkout lacks to make it is one sentence, on every rank."""

import os
import shutil
import sys
import sysconfig
from pathlib import Path

import pytest

from ep_plugin.cli import main
from ep_plugin.errors import ConfigError
from ep_plugin.megatron.seams import wheel

pytestmark = pytest.mark.megatron


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the Makefile of a checkout, nothing compiled, and programs that work."""
    (tmp_path / "Makefile").touch()
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    for name, says in (("make", ""), ("g++", ""), ("python3", "-I x"), ("python3-config", suffix)):
        program(tmp_path / "bin" / name, f"echo '{says}'")
    monkeypatch.setattr(wheel, "_folder", lambda: tmp_path)
    monkeypatch.setattr(wheel, "is_compiled", lambda: False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv("CXX", raising=False)
    return tmp_path


def program(path: Path, body: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!{shutil.which('sh', path=os.defpath)}\n{body}\n")
    path.chmod(0o755)


def test_with_all_that_is_needed_nothing_is_said(checkout: Path) -> None:
    wheel.check_helpers()


@pytest.mark.parametrize(
    ("name", "body", "remedy"),
    [
        ("make", None, "make and a C++ compiler must be on PATH; use apt-get install make g++"),
        ("g++", None, "make and a C++ compiler must be on PATH; use apt-get install make g++"),
        ("python3", "exit 1", "pybind11 of python3 must be on PATH; use pip install pybind11"),
        ("python3", None, "pybind11 of python3 must be on PATH; use pip install pybind11"),
        ("python3-config", "echo .cpython-27.so", "a python3-config of this Python must be on PA"),
    ],
)
def test_what_is_missing_is_named_with_the_remedy(
    name: str,
    body: str | None,
    remedy: str,
    checkout: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if body is None:
        (checkout / "bin" / name).unlink()
    else:
        program(checkout / "bin" / name, body)
    with pytest.raises(ConfigError) as error:
        wheel.check_helpers()
    assert remedy in str(error.value)
    monkeypatch.setenv("PATH", f"{checkout / 'bin'}:{Path(sys.executable).parent}:{os.defpath}")
    if name == "python3-config":
        assert main(["doctor"]) == 1
        assert "broken  megatron's helper" in capsys.readouterr().out
    monkeypatch.setattr(wheel, "is_compiled", lambda: True)
    wheel.check_helpers()


def test_a_wheel_ships_it(capsys: pytest.CaptureFixture[str]) -> None:
    wheel.check_helpers()
    assert wheel.is_compiled()
