"""megatron-core releases side by side, each in a folder of its own under .venv/megatron.

python tests/helpers/releases.py all|newest|RELEASE

installs what is missing (a test that needs one does so too) and prints the releases to test in
full, for the variable EP_RELEASES. The others are tested where releases differ (layouts.py and
test_older_releases.py say where), and share the other tests: each is run on one of them, always the
same. Without the variable all are tested in full.
"""

import os
import subprocess
import sys
import zlib
from importlib.metadata import distribution
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = Path(sys.prefix) / "megatron"
RELEASES = ("0.16.1", "0.17.1", "0.18.2", "0.19.2")
NEWEST = RELEASES[-1]
OLDER_WITH_LOOP = ("0.17.1", "0.18.2")  # a wheel of 0.16 has no megatron.training
VARIABLE = "EP_RELEASES"
CHECKOUT = "EP_MEGATRON_CHECKOUT"  # a folder with Megatron-LM of the commit in core_0_20.py
DEVELOPMENT = "main"


def choose(words: str) -> tuple[str, ...]:
    """Return the releases tested in full, always the newest; raises ValueError for an unknown
    word."""
    meaning = {"all": RELEASES, "newest": ()}
    found = {NEWEST}
    for word in words.split():
        if word not in meaning and word not in RELEASES:
            legal = ", ".join([*meaning, *RELEASES])
            raise ValueError(f"--releases must be one of {legal}; got {word!r}; use --releases all")
        found.update(meaning.get(word, (word,)))
    return tuple(release for release in RELEASES if release in found)


def in_full() -> tuple[str, ...]:
    """Return the releases that EP_RELEASES names; all without it."""
    return choose(os.environ.get(VARIABLE) or "all")


def shared_out(name: str, among: tuple[str, ...]) -> str:
    """Return which of some releases runs what is called `name`; always the same one."""
    return among[zlib.crc32(name.encode()) % len(among)]


def shared_out_here(name: str) -> bool:
    """Return whether this process's release runs what is called `name`.

    One of the older releases does that are not tested in full; any other release runs everything.
    """
    from megatron.core import __version__ as version

    return (
        version not in OLDER_WITH_LOOP
        or version in in_full()
        or version == shared_out(name, OLDER_WITH_LOOP)
    )


def installed(version: str) -> Path:
    """Return a folder to put on Python's path for this release, or for `DEVELOPMENT`.

    Raises CalledProcessError where it cannot be installed, KeyError where no checkout is given.

    Dependencies are those of the environment, and so is the release that it already has.
    """
    if version == DEVELOPMENT:
        return Path(os.environ[CHECKOUT])
    own = distribution("megatron-core")
    if own.version == version:
        return Path(str(own.locate_file("")))
    folder = FOLDER / version
    if not (folder / "complete").exists():
        command = ["install", "--quiet", "--no-deps", "--upgrade", "--target", str(folder)]
        subprocess.run(
            [sys.executable, "-m", "pip", *command, f"megatron-core=={version}"],
            stdout=subprocess.DEVNULL,  # ours is read by run.sh
            check=True,
        )
        # `megatron` is a namespace package: what a wheel lacks would come from the environment's.
        (folder / "megatron" / "__init__.py").touch()
        (folder / "complete").touch()
    return folder


def environment(version: str) -> dict[str, str]:
    """Return the variables under which a Python process finds this release before others."""
    path = [str(ROOT), str(ROOT / "tests" / "helpers"), str(installed(version))]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path)}


def main(words: str) -> int:
    """Install every release; say on stderr how each is tested, and on stdout which in full."""
    try:
        chosen = choose(words)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for release in RELEASES:
        extent = "in full" if release in chosen else "where releases differ, and a share"
        print(f"megatron-core {release}: {extent} ({installed(release)})", file=sys.stderr)
    print(*chosen)
    return 0


if __name__ == "__main__":
    sys.exit(main(" ".join(sys.argv[1:]) or "all"))
