"""The edge's tests over the older releases that have Megatron's training loop.

All of them on a release that is tested in full (EP_RELEASES, see releases.py), and on the others
those of `SEAMS`: what the plugin hooks, its touch points, the parser, the log, saves and resuming.
Megatron 0.16 has none in its wheel: `test_layouts.py` drives its own schedule.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from releases import OLDER_WITH_LOOP, ROOT, environment, in_full, installed

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
    "test_initial_values",
    "test_install",
    "test_older_loop",
    "test_optimizers",
    "test_resume",
    "test_routing_flags",
    "test_touchpoints",
)
Running = dict[str, tuple[subprocess.Popen[str], Path]]  # release -> its tests, what they say


def files(version: str) -> list[str]:
    """Return the files of tests to run on a release."""
    folder = Path(__file__).parent
    if version not in in_full():
        return [str(folder / f"{name}.py") for name in SEAMS]
    return [
        str(path) for path in sorted(folder.glob("test_*.py")) if path.stem not in RUN_ELSEWHERE
    ]


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
