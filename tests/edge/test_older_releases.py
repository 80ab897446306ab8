"""The edge's tests over the older releases that have Megatron's training loop.

All of them on a release that is tested in full (EP_RELEASES, see releases.py). On the others those
of `SEAMS`: what the plugin hooks, its touch points, the parser, the log, saves and resuming. Each
of the other files is run on one of these releases. Megatron 0.16 has none in its wheel:
`test_layouts.py` drives its own schedule.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from layouts import WITH_HYBRID
from releases import (
    NEWEST,
    OLDER_WITH_LOOP,
    ROOT,
    VARIABLE,
    environment,
    in_full,
    installed,
    shared_out,
)

from ep_plugin.megatron.cpu import mode as cpu_mode

pytestmark = [
    pytest.mark.megatron,
    pytest.mark.skipif(
        not cpu_mode.wanted(), reason="a GPU is here and EP_PLUGIN_DEVICE is not cpu"
    ),
]
RUN_ELSEWHERE = (
    *("test_layouts", "test_releases", "test_older_releases"),
    *("test_theirs", "test_patches"),
)
SEAMS = (
    "test_audit_save",
    "test_cpu_flags",
    "test_initial_values",
    "test_install",
    "test_older_loop",
    "test_optimizers",
    "test_resume",
    "test_routing_flags",
    "test_served",
    "test_touchpoints",
)
Running = dict[str, tuple[subprocess.Popen[str], Path]]  # release -> its tests, what they say


def files(version: str) -> list[str]:
    """Return the files of tests to run on a release."""
    full = in_full()
    return [
        str(path)
        for path in sorted(Path(__file__).parent.glob("test_*.py"))
        if path.stem not in RUN_ELSEWHERE
        and (
            version in full
            or path.stem in SEAMS
            or version == shared_out(path.stem, OLDER_WITH_LOOP)
        )
    ]


def release_of(name: str) -> str:
    """Return the release that runs a file which is not of `SEAMS`."""
    return shared_out(name, OLDER_WITH_LOOP)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Running:
    """Start the tests of all releases at once: a run waits more than it computes."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not newest"]
    started = {}
    for version in OLDER_WITH_LOOP:
        try:
            installed(version)
        except subprocess.CalledProcessError:
            continue
        said = tmp_path_factory.mktemp("older") / version
        with said.open("w") as file:
            started[version] = (
                subprocess.Popen(
                    [*command, *files(version)],
                    cwd=ROOT,
                    env=environment(version),
                    text=True,
                    stdout=file,
                    stderr=file,
                ),
                said,
            )
    return started


@pytest.mark.parametrize("version", OLDER_WITH_LOOP)
def test_the_edge(version: str, running: Running) -> None:
    if version not in running:
        pytest.skip(f"megatron-core {version} cannot be installed here")
    process, said = running[version]
    code = process.wait()
    assert code == 0, said.read_text()[-20000:]
    passed = re.search(r"(\d+) passed", said.read_text())
    assert passed is not None
    assert int(passed[1]) > (150 if version in in_full() else 60)


def test_each_file_is_run_on_one_older_release_and_the_seams_on_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(VARIABLE, NEWEST)
    runs = {version: {Path(path).stem for path in files(version)} for version in OLDER_WITH_LOOP}
    every = {path.stem for path in Path(__file__).parent.glob("test_*.py")}
    assert set.union(*runs.values()) == every - set(RUN_ELSEWHERE)
    assert set.intersection(*runs.values()) == set(SEAMS)
    assert release_of("test_only_gpt") in WITH_HYBRID  # it looks at HybridModels alone
    monkeypatch.setenv(VARIABLE, "0.17.1")
    assert {Path(path).stem for path in files("0.17.1")} == every - set(RUN_ELSEWHERE)
