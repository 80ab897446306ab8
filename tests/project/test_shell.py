"""Shell scripts: they parse, find a Python that starts, and say so when there is none."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import SLOW

ROOT = Path(__file__).parents[2]
SCRIPTS = [
    *sorted(ROOT.glob("recipes/*.sh")),
    ROOT / "tests" / "run.sh",
    *sorted(ROOT.glob(".ci/*")),
]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_parses(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    if not script.name.startswith("_"):
        assert "set -euo pipefail" in script.read_text()
        assert os.access(script, os.X_OK)


def executable(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def checkout(folder: Path) -> None:
    """Make a folder look like a checkout of the project."""
    (folder / "ep_plugin").mkdir(parents=True)
    for name in ("pyproject.toml", "constraints.txt", "ep_plugin/__init__.py"):
        (folder / name).touch()


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
    checkout(tmp_path)
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
    checkout(tmp_path)
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


def test_versions_are_those_tested_unless_the_newest_are_asked_for(tmp_path: Path) -> None:
    """Each choice undoes the other's; the newest are looked for every time."""
    checkout(tmp_path)
    executable(tmp_path / ".venv" / "bin" / "python", 'echo "$*" >>calls')
    executable(tmp_path / "bin" / "python3", "echo Python 3.12")
    call = "setup_project || exit $?"
    for newest in ("0", "0", "1", "1", "0"):
        done = source_setup(tmp_path, call, EP_PYTHON="python3", EP_NEWEST=newest)
        assert done.returncode == 0, done.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    tested, newest = "--constraint constraints.txt", "--upgrade --upgrade-strategy eager"
    installs = [call for call in calls if "--editable" in call]
    assert [tested in call for call in installs] == [True, False, False, True]
    assert [newest in call for call in installs] == [False, True, True, False]


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


def quickstart(tmp_path: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run the real quickstart in a folder whose .venv holds a Python that only notes its calls."""
    project = tmp_path / "project"
    (project / "recipes").mkdir(parents=True)
    for name in ("quickstart.sh", "_setup.sh", "_check.sh"):
        shutil.copy(ROOT / "recipes" / name, project / "recipes")
    checkout(project)
    python = """case "$*" in *device_count*) echo 0 ;; *_measure*) echo "$*" >>calls ;; esac"""
    executable(project / ".venv" / "bin" / "python", python)
    stamp = subprocess.run(["cksum"], input="", capture_output=True, text=True, check=True).stdout
    (project / ".venv" / "ep_plugin.stamp").write_text(stamp)
    (project / "run").mkdir()
    (project / "run" / "summary.json").touch()
    return subprocess.run(
        [str(project / "recipes" / "quickstart.sh")],
        env={"PATH": os.environ["PATH"], "RUN_DIR": "run", **settings},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("settings", "micro", "batch", "ep"),
    [
        ({}, 8, 16, 2),  # without a GPU: two ranks
        ({"RANKS": "1"}, 8, 16, 1),
        ({"RANKS": "2"}, 8, 16, 2),
        ({"RANKS": "3"}, 8, 24, 1),
        ({"RANKS": "4"}, 8, 32, 4),
        ({"RANKS": "6"}, 8, 48, 2),
        ({"RANKS": "16"}, 8, 128, 8),
        ({"RANKS": "4", "MICRO_BATCH": "1"}, 1, 16, 4),
        ({"RANKS": "4", "GLOBAL_BATCH": "96", "EP": "2"}, 8, 96, 2),
    ],
)
def test_quickstart_sizes_fit_any_number_of_ranks(
    tmp_path: Path, settings: dict[str, str], micro: int, batch: int, ep: int
) -> None:
    done = quickstart(tmp_path, **settings)
    assert done.returncode == 0, done.stderr
    calls = (tmp_path / "project" / "calls").read_text().splitlines()
    trained = [call for call in calls if "pretrain_gpt.py" in call]
    assert len(trained) == 6
    for call in trained:
        assert f"--nproc-per-node {settings.get('RANKS', '2')} " in call
        assert f"--micro-batch-size {micro} --global-batch-size {batch} " in call
        assert ("--num-experts" in call) == (f"--expert-model-parallel-size {ep} " in call)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"RANKS": "4", "GLOBAL_BATCH": "16"},
            "GLOBAL_BATCH must be a multiple of MICRO_BATCH x RANKS; got GLOBAL_BATCH=16, "
            "MICRO_BATCH=8, RANKS=4; use GLOBAL_BATCH=32",
        ),
        (
            {"RANKS": "4", "EP": "3"},
            "EP must divide RANKS and EXPERTS; got EP=3, RANKS=4, EXPERTS=8; use EP=4",
        ),
        (
            {"EXPERTS": "4", "TOPK": "5"},
            "TOPK must be at most EXPERTS; got TOPK=5, EXPERTS=4; use TOPK=4",
        ),
        (
            {"HIDDEN": "100", "HEADS": "3"},
            "HEADS must divide HIDDEN; got HIDDEN=100, HEADS=3; use HIDDEN=102",
        ),
        (
            {"LR": "fast"},
            "LR must be a number above 0; got 'fast'; without it the default is taken",
        ),
        (
            {"SPLIT": "98"},
            "SPLIT must be three numbers, for training, validation and test; got '98'; use "
            "SPLIT=98,1,1",
        ),
        (
            {"DATA_INPUT": "none"},
            "DATA_INPUT must be a folder or a file of text; got 'none', which does not exist; "
            "without it Python's library is taken",
        ),
        (
            {"RANKS": "0"},
            "RANKS must be a whole number from 1 on; got '0'; without it the default is taken",
        ),
        (
            {"MICRO_BATCH": "many"},
            "MICRO_BATCH must be a whole number from 1 on; got 'many'; without it the default "
            "is taken",
        ),
    ],
)
def test_quickstart_refuses_contradicting_sizes_first(
    tmp_path: Path, settings: dict[str, str], message: str
) -> None:
    done = quickstart(tmp_path, **settings)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {message}\n")
    assert not (tmp_path / "project" / "calls").exists()
    assert not (tmp_path / "project" / "run" / "logs").exists()


TORCHRUN = """\
W0101 00:00:00.1 9 torch/distributed/elastic/multiprocessing/api.py:1028] Sending process 5 closing signal SIGTERM
E0101 00:00:00.2 9 torch/distributed/elastic/multiprocessing/api.py:1002] failed (exitcode: 1) local_rank: 1 (pid: 6)
Traceback (most recent call last):
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
rank      : 1 (local_rank: 1)
traceback : Signal 9 (SIGKILL) received by PID 6
"""  # noqa: E501
SECOND = "[rank0]: Traceback:\n" + "[rank0]:   a frame\n" * 30 + "[rank0]: OSError: peer closed\n"


@pytest.mark.parametrize(
    ("log", "shown"),
    [
        ("".join(f"{i}\n" for i in range(30)), [str(i) for i in range(10, 30)]),
        ("start\nep_plugin: error: the rule\n" + TORCHRUN, ["start", "ep_plugin: error: the rule"]),
        (
            "Traceback:\n  a line\ntorch.OutOfMemoryError: 7 GiB\n" + SECOND + TORCHRUN,
            ["Traceback:", "  a line", "torch.OutOfMemoryError: 7 GiB", *SECOND.splitlines()[:3]],
        ),
        (
            "[rank1]: Traceback:\n[rank1]: AssertionError\n" + TORCHRUN,
            ["[rank1]: Traceback:", "[rank1]: AssertionError"],
        ),
        ("killed\n" + TORCHRUN, ["killed", *TORCHRUN.splitlines()]),
    ],
    ids=["no error", "a sentence", "two tracebacks", "prefixed", "a signal"],
)
def test_a_failing_step_shows_what_went_wrong(tmp_path: Path, log: str, shown: list[str]) -> None:
    """The real step function, with a command that writes a log and fails."""
    (tmp_path / "written").write_text(log)
    text = (ROOT / "recipes" / "quickstart.sh").read_text()
    functions = text[text.index("why() {") : text.index("train() {")]
    command = f"set -euo pipefail; cd {ROOT}; RUN_DIR={tmp_path}; mkdir {tmp_path}/logs\n"
    command += f"{functions}\nstep broken nowhere sh -c 'cat {tmp_path}/written; exit 7'"
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", command], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 7
    lines = done.stderr.splitlines()
    assert lines[0] == (
        f"error: step broken failed with exit code 7; from {tmp_path}/logs/broken.log:"
    )
    assert lines[1:] == shown
    assert not (tmp_path / "logs" / "broken.usage.json").exists()


def run_tests(tmp_path: Path, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run the real tests/run.sh in a folder whose .venv holds programs that note their calls."""
    project = tmp_path / "project"
    (project / "recipes").mkdir(parents=True)
    (project / "tests").mkdir()
    shutil.copy(ROOT / "recipes" / "_setup.sh", project / "recipes")
    shutil.copy(ROOT / "tests" / "run.sh", project / "tests")
    checkout(project)
    programs = project / ".venv" / "bin"
    for name in ("ruff", "mypy", "pytest"):
        executable(programs / name, f'echo "{name} $*; EP_RELEASES=$EP_RELEASES" >>calls')
    releases = (
        f'*releases.py*) shift; exec {sys.executable} {ROOT}/tests/helpers/releases.py "$@" ;;'
    )
    executable(programs / "python", f'case "$*" in {releases} esac')
    stamp = subprocess.run(["cksum"], input="", capture_output=True, text=True, check=True).stdout
    (project / ".venv" / "ep_plugin.stamp").write_text(stamp)
    return subprocess.run(
        [str(project / "tests" / "run.sh"), *arguments],
        env={"PATH": os.environ["PATH"], **settings},
        capture_output=True,
        text=True,
        check=False,
    )


def pytest_calls(tmp_path: Path) -> list[str]:
    calls = (tmp_path / "project" / "calls").read_text().splitlines()
    assert [call.split()[0] for call in calls[:3]] == ["ruff", "ruff", "mypy"]
    return [call for call in calls if call.startswith("pytest")]


def test_the_quick_run_leaves_the_slow_tests_out(tmp_path: Path) -> None:
    done = run_tests(tmp_path, "--quick", "tests/commands/test_cli.py", "-k", "a b")
    assert (done.returncode, done.stderr) == (0, "")
    (call,) = pytest_calls(tmp_path)
    assert call.startswith("pytest -m not slow ")
    assert call.endswith("tests/commands/test_cli.py -k a b; EP_RELEASES=")


@pytest.mark.parametrize(
    ("arguments", "settings", "chosen"),
    [
        (("--releases", "newest"), {}, "0.19.2"),
        (("--releases=0.17.1", "-x"), {}, "0.17.1 0.19.2"),
        ((), {"EP_RELEASES": "all"}, "0.16.1 0.17.1 0.18.2 0.19.2"),
    ],
)
def test_releases_are_chosen_once_and_said(
    tmp_path: Path, arguments: tuple[str, ...], settings: dict[str, str], chosen: str
) -> None:
    done = run_tests(tmp_path, *arguments, **settings)
    assert done.returncode == 0, done.stderr
    (call,) = pytest_calls(tmp_path)
    words = ["pytest -m not long", *(word for word in arguments[1:] if word != "newest")]
    assert call.rstrip().replace(" ;", ";") == f"{' '.join(words)}; EP_RELEASES={chosen}"
    assert "megatron-core 0.19.2: in full" in done.stderr
    assert ("0.16.1: in full" in done.stderr) is ("0.16.1" in chosen)


def test_an_unknown_release_ends_the_run_before_the_tests(tmp_path: Path) -> None:
    done = run_tests(tmp_path, "--releases", "0.17")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --releases must be one of all, newest, 0.16.1, ")
    assert pytest_calls(tmp_path) == []


def test_help_of_the_test_run(tmp_path: Path) -> None:
    done = run_tests(tmp_path, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "examples:" in done.stdout
    assert not (tmp_path / "project" / "calls").exists()


@pytest.mark.parametrize("entry", SLOW)
def test_what_is_called_slow_is_there(entry: str) -> None:
    file, _, test = entry.partition("::")
    (path,) = (ROOT / "tests").rglob(f"{file}.py")
    assert f"def {test}(" in path.read_text() if test else "def test_" in path.read_text()


RECIPES = [*ROOT.glob("recipes/[!_]*.sh"), *ROOT.glob("recipes/slurm/*.sbatch")]


@pytest.mark.parametrize("script", RECIPES, ids=lambda path: path.name)
def test_help_has_examples_and_every_setting(script: Path) -> None:
    """It starts nothing, and makes no environment."""
    for word in ("-h", "--help"):
        done = subprocess.run(
            ["bash", str(script), word],
            env={"PATH": "/usr/bin:/bin"},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert len(re.findall(rf"{script.name}\b", done.stdout)) >= 2
        assert "MODEL=" in done.stdout or re.search(r"^  [A-Z]+=\S+ .*sh$", done.stdout, re.M)
        for name in re.findall(
            r'^([A-Z_]+)="\$\{\1:-[^}]*\}" *#', script.read_text(), re.MULTILINE
        ):
            assert name in done.stdout


@pytest.mark.parametrize(
    ("script", "settings", "message"),
    [
        ("convert.sh", {"RANKS": "3"}, "RANKS must be 1, 2 or 4, which divide the 8 experts"),
        ("convert.sh", {"ITERS": "1.5"}, "ITERS must be a whole number from 1 on; got '1.5'"),
        ("convert.sh", {"RUN_DIR": "README.md"}, "RUN_DIR must be a folder, or one to make; got"),
    ],
)
def test_convert_refuses_first(script: str, settings: dict[str, str], message: str) -> None:
    done = subprocess.run(
        ["bash", str(ROOT / "recipes" / script)],
        env={"PATH": "/usr/bin:/bin", **settings},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {message}")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", ["convert.sh", "quickstart.sh"])
def test_words_that_a_recipe_does_not_take_are_refused(name: str) -> None:
    done = subprocess.run(
        ["bash", str(ROOT / "recipes" / name), "--ranks", "4"],
        env={"PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: recipes/{name} takes no words, and got '--ranks'; use")
