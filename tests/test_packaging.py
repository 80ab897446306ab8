"""What users get: a wheel that holds all they need, with types that their checker reads."""

import os
import subprocess
import sys
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import ep_plugin

ROOT = Path(__file__).parents[1]
USER = """
from ep_plugin import MoEConfig, MoELayer

layer: MoELayer = MoELayer(MoEConfig(hidden_size=16, ffn_hidden_size=8, num_experts="two"))
"""


def run(*words: object, cwd: Path = ROOT, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's wheel, built from a copy so that nothing is left in the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("ep_plugin", "recipes", "patches", "pyproject.toml", "README.md", "LICENSE"):
        (source / name).symlink_to(ROOT / name)
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation")
    done = run(*pip, "--wheel-dir", folder, source)
    assert done.returncode == 0, done.stderr[-3000:]
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_has_the_version_and_the_mark_of_typed_packages(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        fields = Parser().parsestr(archive.read(metadata).decode())
    assert fields["Version"] == ep_plugin.__version__
    assert "ep_plugin/py.typed" in names
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "ep_plugin").rglob("*.py")}
    assert {name for name in names if name.endswith(".py") and "/files/" not in name} == modules
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"ep_plugin"}


def test_a_user_s_type_checker_sees_our_types(wheel: Path, tmp_path: Path) -> None:
    """Without py.typed mypy would say that the package has no types, and nothing of the mistake."""
    venv.create(tmp_path / "env")  # where mypy, unlike in a checkout, asks for py.typed
    (site,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    (tmp_path / "user.py").write_text(USER)
    (tmp_path / "mypy.ini").write_text("[mypy]\n[mypy-torch.*]\nignore_missing_imports = True\n")
    python = tmp_path / "env" / "bin" / "python"
    mypy = (sys.executable, "-m", "mypy", "--python-executable", python, "user.py")
    done = run(*mypy, cwd=tmp_path, PYTHONPATH="")
    assert done.returncode == 1, done.stderr
    error, summary = done.stdout.splitlines()
    assert error.startswith(
        'user.py:4: error: Argument "num_experts" to "MoEConfig" has incompatible'
    )
    assert summary.startswith("Found 1 error")
