"""The edge's tests over the older releases that have Megatron's training loop.

Megatron 0.16 has none in its wheel: `test_layouts.py` drives its own schedule.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from releases import ROOT, environment, installed

from ep_plugin.megatron import cpu

pytestmark = [
    pytest.mark.megatron,
    pytest.mark.skipif(not cpu.wanted(), reason="a GPU is here and EP_PLUGIN_DEVICE is not cpu"),
]
RUN_ELSEWHERE = ("test_layouts", "test_releases", "test_older_releases")
OF_THE_NEWEST = ("test_combined", "test_applied")  # its own schedule; the recipe, which is its own


@pytest.mark.parametrize("version", ["0.17.1", "0.18.2"])
def test_the_edge(version: str) -> None:
    try:
        installed(version)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"megatron-core {version} cannot be installed here: {error}")
    files = sorted(Path(__file__).parent.glob("test_*.py"))
    chosen = [path for path in files if path.stem not in (*RUN_ELSEWHERE, *OF_THE_NEWEST)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, chosen)],
        cwd=ROOT,
        env=environment(version),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-20000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) > 150
