"""What messages say to install is what pyproject.toml asks for; nothing is named as on an index."""

import tomllib
from pathlib import Path

import pytest

from ep_plugin.extras import PACKAGES, pip_install

ROOT = Path(__file__).parents[2]
TEXTS = [
    path
    for pattern in ("*.md", "docs/*.md", "ep_plugin/**/*.py", "recipes/**/*", "patches/**/*.md")
    for path in ROOT.glob(pattern)
    if path.is_file() and path.suffix in (".md", ".py", ".sh", ".sbatch") and path.stem != "extras"
]


def test_the_packages_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert {name: list(packages) for name, packages in PACKAGES.items()} == {
        name: packages for name, packages in extras.items() if name != "dev"
    }


def test_a_command_names_packages_and_quotes_what_a_shell_would_read() -> None:
    assert pip_install("hf") == "pip install safetensors 'transformers>=5'"
    assert pip_install("report", "checkout") == "pip install matplotlib tensorboard pybind11"
    assert pip_install("te").startswith("pip install --no-build-isolation 'transformer-engine[")


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nobody_is_told_to_install_the_plugin_from_an_index(path: Path) -> None:
    """It is on none: who registered the name there would run code wherever that is typed."""
    text = path.read_text().replace('"', "'")
    assert "ep-plugin[" not in text
    assert "install ep-plugin" not in text
    assert "install 'ep-plugin" not in text
