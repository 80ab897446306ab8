"""megatron-core releases side by side, each in a folder of its own under .venv/megatron.

python tests/edge/releases.py    installs what is missing; a test that needs one does so too
"""

import os
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = Path(sys.prefix) / "megatron"
RELEASES = ("0.16.1", "0.17.1", "0.18.2", "0.19.2")
OLDER_WITH_LOOP = ("0.17.1", "0.18.2")  # a wheel of 0.16 has no megatron.training


def installed(version: str) -> Path:
    """Return a folder to put on Python's path for this release; raises CalledProcessError.

    Dependencies are those of the environment, and so is the release that it already has.
    """
    own = distribution("megatron-core")
    if own.version == version:
        return Path(str(own.locate_file("")))
    folder = FOLDER / version
    if not (folder / "complete").exists():
        command = ["install", "--quiet", "--no-deps", "--upgrade", "--target", str(folder)]
        subprocess.run(
            [sys.executable, "-m", "pip", *command, f"megatron-core=={version}"], check=True
        )
        # `megatron` is a namespace package: what a wheel lacks would come from the environment's.
        (folder / "megatron" / "__init__.py").touch()
        (folder / "complete").touch()
    return folder


def environment(version: str) -> dict[str, str]:
    """Return the variables under which a Python process finds this release before others."""
    path = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "edge"), str(installed(version))]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path)}


if __name__ == "__main__":
    for release in RELEASES:
        print(release, installed(release))
