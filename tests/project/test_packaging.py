"""What users get: a wheel that holds all they need, with types that their checker reads."""

import json
import os
import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import ep_plugin
from ep_plugin.cli import main

ROOT = Path(__file__).parents[2]
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


def files_of(folder: Path) -> set[str]:
    """Return the files of recipes/ and patches/ in a folder."""
    found = (path for name in ("recipes", "patches") for path in (folder / name).rglob("*"))
    files = (path.relative_to(folder) for path in found if path.is_file())
    return {str(path) for path in files if "__pycache__" not in path.parts}


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
    assert "BuildBackendWarning" not in done.stderr
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


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to put on Python's path, with the wheel as pip installs it."""
    folder = tmp_path_factory.mktemp("installed")
    done = run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", folder, wheel)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_a_copy_from_the_wheel_is_the_checkout_s_and_runs(installed: Path, tmp_path: Path) -> None:
    path = {"PYTHONPATH": str(installed)}
    command = (sys.executable, "-m", "ep_plugin.cli", "recipes", "--copy", "mine")
    done = run(*command, cwd=tmp_path, **path)
    assert done.returncode == 0, done.stderr
    mine = tmp_path / "mine"
    assert files_of(mine) == files_of(ROOT)
    for name in files_of(mine):
        assert (mine / name).read_bytes() == (ROOT / name).read_bytes(), name
        assert os.access(mine / name, os.X_OK) is os.access(ROOT / name, os.X_OK), name
    recipe = {"MODEL": "qwen3-nano", "LAYOUT": "ep2", "DRY_RUN": "1", "NPROC_PER_NODE": "2"}
    done = run("recipes/run.sh", "recipes/pretrain_gpt.py", cwd=mine, **path, **recipe)
    assert done.returncode == 0, done.stderr
    assert "ep_plugin.run recipes/pretrain_gpt.py" in done.stdout
    done = run("bash", "recipes/slurm/pretrain.sbatch", "mine.py", cwd=mine, **path, **recipe)
    assert done.returncode == 0, done.stderr


def test_a_copied_quickstart_uses_the_python_on_path(installed: Path, tmp_path: Path) -> None:
    """The first step, making data, runs; with a Python that lacks the project nothing does."""
    command = (sys.executable, "-m", "ep_plugin.cli", "recipes", "--copy", "mine", "quickstart.sh")
    path = {"PYTHONPATH": str(installed)}
    assert run(*command, cwd=tmp_path, **path).returncode == 0
    (tmp_path / "mine" / "text").mkdir()
    settings = {"DATA_INPUT": "text", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = run("mine/recipes/quickstart.sh", cwd=tmp_path, **path, **settings)
    assert done.stdout.startswith("data -> data/quickstart")
    assert "error: step data failed" in done.stderr
    assert "text" in done.stderr
    venv.create(tmp_path / "env")
    settings["PATH"] = f"{tmp_path}/env/bin:{os.environ['PATH']}"
    done = run("mine/recipes/quickstart.sh", cwd=tmp_path, PYTHONPATH="", **settings)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ep_plugin must be installed where")
    assert len(done.stderr.splitlines()) == 1


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "mine"
    assert main(["recipes", "--copy", str(folder), "qwen3-nano", "--json"]) == 0
    files = json.loads(capsys.readouterr().out)["files"]
    assert set(files) == files_of(folder)
    assert {"recipes/models/qwen3-nano.sh", "recipes/run.sh"} <= set(files)
    (folder / "recipes" / "run.sh").write_text("mine")
    assert main(["recipes", "--copy", str(folder), "ep2"]) == 2
    assert re.search(
        rf"{folder}/recipes/\S+ is there and is not overwritten; use --copy ANOTHER_FOLDER",
        capsys.readouterr().err,
    )
    assert not (folder / "recipes" / "layouts").exists()
    assert (folder / "recipes" / "run.sh").read_text() == "mine"
    assert main(["recipes", "--copy", str(folder), "core_0_19/pretrain_gpt.patch"]) == 0
    assert capsys.readouterr().out == f"2 files copied to {folder}\n"
    assert main(["recipes", "--copy", str(folder / "recipes" / "run.sh")]) == 2
    assert "--copy must be a folder; " in capsys.readouterr().err


def test_every_recipe_is_listed_with_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert main(["recipes", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [line.split()[:2] for line in lines] == [[r["kind"], r["name"]] for r in listed]
    assert all(len(line.split()) > 4 for line in lines)
    own = {recipe["files"][0] for recipe in listed}
    assert own == {name for name in files_of(ROOT) if not re.search(r"README|/_", name)}
    (needs,) = (recipe["files"] for recipe in listed if recipe["name"] == "quickstart.sh")
    assert {"recipes/_setup.sh", "recipes/_measure.py", "recipes/prepare_data.py"} <= set(needs)


def test_every_dependency_has_a_tested_version_that_the_project_allows() -> None:
    text = (ROOT / "constraints.txt").read_text()
    tested = dict(re.findall(r"^([\w-]+)==([\w.]+)$", text, re.MULTILINE))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    named = [Requirement(r) for r in sum(extras.values(), project["dependencies"])]
    ours = {need.name: need.specifier for need in named if need.name != "transformer-engine"}
    assert tested.keys() == {*ours, "numpy"}  # which the tests import
    for name, specifier in ours.items():
        assert specifier.contains(tested[name]), name
