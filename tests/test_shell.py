"""Shell scripts: they parse, find a Python that starts, and say so when there is none."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = [*sorted(ROOT.glob("recipes/*.sh")), ROOT / "tests" / "run.sh", ROOT / ".ci" / "run"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_parses(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    if script.name != "_setup.sh":
        assert "set -euo pipefail" in script.read_text()
        assert os.access(script, os.X_OK)


def executable(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def source_setup(tmp_path: Path, call: str, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run `call` after sourcing _setup.sh where no Python but those of the test can be found."""
    tools = tmp_path / "tools"
    tools.mkdir(exist_ok=True)
    for name in ("cat", "chmod", "cksum", "cp", "mkdir", "sh"):
        found = shutil.which(name)
        assert found is not None
        (tools / name).unlink(missing_ok=True)
        (tools / name).symlink_to(found)
    environment = {"PATH": f"{tmp_path / 'bin'}:{tools}", "HOME": str(tmp_path), **extra}
    bash = shutil.which("bash")
    assert bash is not None
    command = f"set -euo pipefail; source {ROOT}/recipes/_setup.sh; {call}"
    return subprocess.run(
        [bash, "-c", command],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_python_that_does_not_start_is_passed_over(tmp_path: Path) -> None:
    executable(tmp_path / "bin" / "python3.12", "echo 'pyenv: not installed' >&2; exit 127")
    working = executable(
        tmp_path / "pyenv" / "versions" / "3.12.9" / "bin" / "python", f'exec {sys.executable} "$@"'
    )
    done = source_setup(tmp_path, "find_python", PYENV_ROOT=str(tmp_path / "pyenv"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(working)


def test_no_python_is_one_sentence_and_code_2(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").touch()
    executable(tmp_path / "bin" / "python3", "exit 1")
    done = source_setup(tmp_path, "setup_project || exit $?")
    assert done.returncode == 2
    assert done.stderr.startswith("error: Python >= 3.12 with its venv module")
    assert "is needed and none was found" in done.stderr
    assert "EP_PYTHON=/path/to/python3.12" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / ".venv").exists()


def test_an_install_that_failed_is_tried_again(tmp_path: Path) -> None:
    """The environment's Python notes each pip call; installing the project fails the first time."""
    (tmp_path / "pyproject.toml").touch()
    made = executable(
        tmp_path / "made",
        """case "$*" in
        *--editable*) echo install >>calls; if [ ! -f works ]; then exit 3; fi ;;
        esac""",
    )
    executable(
        tmp_path / "bin" / "python3",
        f"""case "$*" in
        *venv*--clear*) echo venv >>calls; mkdir -p .venv/bin && cp {made} .venv/bin/python ;;
        *--version) echo Python 3.12 ;;
        esac""",
    )
    call = "setup_project || exit $?"
    extra = {"EP_PYTHON": "python3"}
    assert source_setup(tmp_path, call, **extra).returncode == 3
    assert not (tmp_path / ".venv" / "ep_plugin.stamp").exists()
    (tmp_path / "works").touch()
    for _ in range(2):  # the second time there is nothing to do
        assert source_setup(tmp_path, call, **extra).returncode == 0
    assert (tmp_path / "calls").read_text().split() == ["venv", "install", "install"]


def test_a_named_python_is_the_only_candidate(tmp_path: Path) -> None:
    done = source_setup(tmp_path, "find_python", EP_PYTHON=str(tmp_path / "none"))
    assert done.returncode == 1
    done = source_setup(tmp_path, "find_python", EP_PYTHON=sys.executable)
    assert done.stdout.strip() == sys.executable


def test_every_setting_at_the_top_of_the_quickstart_is_used() -> None:
    text = (ROOT / "recipes" / "quickstart.sh").read_text()
    settings = re.findall(r'^([A-Z_]+)="\$\{\1:-', text, re.MULTILINE)
    assert len(settings) > 15
    rest = text[text.index("source recipes/_setup.sh") :] + (ROOT / "recipes/_setup.sh").read_text()
    for name in settings:
        assert re.search(rf"\$\{{?{name}\b", rest) or f"(({name}" in rest or f"{name} " in rest, (
            name
        )


def test_a_failing_step_shows_the_end_of_its_log(tmp_path: Path) -> None:
    """The real step function, with a command that fails."""
    text = (ROOT / "recipes" / "quickstart.sh").read_text()
    function = text[text.index("step() {") : text.index("train() {")]
    command = f"cd {ROOT}; RUN_DIR={tmp_path}; mkdir -p {tmp_path}/logs; {function}\n"
    command += "step broken nowhere sh -c 'seq 1 30; exit 7'"
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", command], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 7
    lines = done.stderr.splitlines()
    assert lines[0].startswith("error: step broken failed with exit code 7")
    assert lines[1:] == [str(number) for number in range(11, 31)]
    assert not (tmp_path / "logs" / "broken.usage.json").exists()
