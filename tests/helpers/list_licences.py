"""Print the licences of everything that is installed with the project, as docs/licences.md.

python tests/helpers/list_licences.py > docs/licences.md

Dependencies are followed from pyproject.toml through the metadata of installed packages.
"""

import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
# Not installed where this page is written, or without a word on it; from the package's own page.
ELSEWHERE = {
    "transformer-engine": "Apache-2.0",
    "pybind11": "BSD-3-Clause",
    "tiktoken": "MIT",
    "cuda-toolkit": "NVIDIA Proprietary Software",
}
SPELLING = {  # what metadata says -> the name of the list at spdx.org
    "MIT License": "MIT",
    "MIT license": "MIT",
    "The MIT License (MIT)": "MIT",
    "Expat license": "MIT",
    "Apache Software License": "Apache-2.0",
    "Apache License 2.0": "Apache-2.0",
    "Apache 2.0 License": "Apache-2.0",
    "Apache License, Version 2.0": "Apache-2.0",
    "Apache 2.0": "Apache-2.0",
    "Apache2": "Apache-2.0",
    "Apache": "Apache-2.0",
    "BSD License": "BSD-3-Clause",
    "BSD": "BSD-3-Clause",
    "3-Clause BSD License": "BSD-3-Clause",
    "BSD 3-Clause License": "BSD-3-Clause",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0",
    "The Unlicense (Unlicense)": "Unlicense",
    "ISC License": "ISC",
}
HEAD = """# Licences

The project itself is under Apache-2.0 ([LICENSE](../LICENSE)). It copies no code of the packages
below; pip installs them. Which of them are there depends on the extra and on the machine: CUDA's
libraries, for example, come with torch where there is a GPU.
`python tests/helpers/list_licences.py > docs/licences.md` writes this page from the metadata of
what is installed.

| package | licence | needed by |
|---|---|---|"""


def asked() -> dict[str, tuple[Requirement, str]]:
    """Return each package that pyproject.toml names, and the extra that it is in."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {"ep_plugin": project["dependencies"], **project["optional-dependencies"]}
    found: dict[str, tuple[Requirement, str]] = {}
    for extra, words in extras.items():
        for word in words:
            needed = Requirement(word)
            by = extra if extra == "ep_plugin" else f"extra {extra}"
            found.setdefault(canonicalize_name(needed.name), (needed, by))
    return found


def rows() -> Iterator[tuple[str, str, str]]:
    """Yield (package, licence, needed by), those of pyproject.toml first."""
    listed = asked()
    waiting = list(listed)
    for name in waiting:  # which grows
        needed, by = listed[name]
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            if name in ELSEWHERE:
                yield name, ELSEWHERE[name], by
            continue
        yield name, ELSEWHERE.get(name) or licence(installed), by
        for further in sorted(map(Requirement, installed.requires or []), key=str):
            marker, key = further.marker, canonicalize_name(further.name)
            wanted = marker is None or any(
                marker.evaluate({"extra": e}) for e in ("", *needed.extras)
            )
            if wanted and key not in listed:
                listed[key] = (further, name)
                waiting.append(key)


def licence(package: Distribution) -> str:
    """Return what a package says of its licence, in one short name."""
    found = package.metadata
    classifiers = [
        line.rpartition(" :: ")[2]
        for line in found.get_all("Classifier") or []
        if line.startswith("License ::")
    ]
    own = (found.get("License") or "").strip()
    words = [found.get("License-Expression") or "", *([own] if 0 < len(own) < 60 else [])]
    words += [" and ".join(sorted({SPELLING.get(word, word) for word in classifiers}))]
    first = next((word for word in words if word), "not said")
    return SPELLING.get(first, first)


def page() -> str:
    """Return the whole page."""
    return "\n".join([HEAD, *(f"| {name} | {said} | {by} |" for name, said, by in rows())]) + "\n"


if __name__ == "__main__":
    sys.stdout.write(page())
