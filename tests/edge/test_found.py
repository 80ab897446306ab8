"""A Megatron that is missing, of another release, or another project's: what is said helps."""

import subprocess
import sys
from pathlib import Path

import pytest
from spawn import run_ranks

from ep_plugin.errors import ConfigError
from ep_plugin.megatron.seams import found, touchpoints

NEWEST = touchpoints.newest()
PIP = f"pip install 'megatron-core[training]=={NEWEST}.*'"


def said(place: str, script: bool, installed: bool = False) -> str:
    """Return what is said of the Megatron that Python finds in `place`, in a fresh process."""
    sys.path[:] = [place, *sys.path] if script else [sys.path[0], place, *sys.path[1:]]
    for name in [name for name in sys.modules if name.partition(".")[0] == "megatron"]:
        del sys.modules[name]  # the ranks of other tests begin with Megatron imported
    if installed:
        found.site.getsitepackages = lambda prefixes=None: [place]
    try:
        touchpoints.release_for(touchpoints.installed_version())
    except ConfigError as error:
        return str(error)
    return "ok"


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


CORE = "megatron/core/__init__.py"
OLD = {"megatron/__init__.py": "", CORE: "__version__ = '0.15.1'"}
NEW = {"megatron/__init__.py": "", CORE: "__version__ = '0.21.0rc1+0123abc'"}
KINDS = {
    "no core": ({"megatron/__init__.py": ""}, "is another project's (it has no megatron.core)"),
    "one file": ({"megatron.py": ""}, "is another project's (it has no megatron.core)"),
    "fails": ({"megatron/__init__.py": "1/0"}, "is another project's (it has no megatron.core)"),
    "no version": ({"megatron/__init__.py": "", CORE: ""}, "(its megatron.core has no version)"),
    "older": (OLD, "megatron-core 0.15.1 is none that the plugin knows; supported are 0.16, "),
    "main": (NEW, "megatron-core 0.21.0rc1+0123abc is none that the plugin knows"),
}


@pytest.mark.parametrize("script", [True, False], ids=["beside the script", "on the path"])
@pytest.mark.parametrize(("files", "what"), KINDS.values(), ids=KINDS)
def test_a_folder_that_pip_cannot_change_is_left_out(
    files: dict[str, str], what: str, script: bool, tmp_path: Path
) -> None:
    write(tmp_path, files)
    (text,) = run_ranks(1, said, str(tmp_path), script)
    assert what in text
    leave = "start a script that lies outside" if script else "leave"
    assert f"{leave} {tmp_path}" in text
    assert PIP in text


@pytest.mark.parametrize("files", [OLD, NEW], ids=["older", "main"])
def test_a_checkout_is_moved_and_a_wheel_installed_anew(
    files: dict[str, str], tmp_path: Path
) -> None:
    write(tmp_path, files)
    (text,) = run_ranks(1, said, str(tmp_path), False, True)
    assert text.endswith(f"; run {PIP}")
    (tmp_path / ".git").mkdir()
    (text,) = run_ranks(1, said, str(tmp_path), False)
    fetch = f"git -C {tmp_path} fetch {found.REPOSITORY} core_r{NEWEST}.0"
    assert text.endswith(f"; run {fetch} && git -C {tmp_path} checkout FETCH_HEAD")


def test_what_megatron_lacks_is_named(tmp_path: Path) -> None:
    write(tmp_path, {"megatron/__init__.py": "", CORE: "import no_such_package.of_it"})
    (text,) = run_ranks(1, said, str(tmp_path), False)
    assert "No module named 'no_such_package'" in text
    assert text.endswith("; run pip install no_such_package")


def test_half_a_megatron_is_installed_anew(tmp_path: Path) -> None:
    write(tmp_path, {"megatron/__init__.py": "", CORE: "import megatron.core.gone"})
    (text,) = run_ranks(1, said, str(tmp_path), False, True)
    package = PIP.removeprefix("pip install")
    assert text.endswith(f"; run pip install --force-reinstall --no-deps{package}")


def test_without_any_the_wheel_and_a_checkout_are_offered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(found, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"Megatron is not installed in .*PYTHONPATH") as refused:
        touchpoints.installed_version()
    assert PIP in str(refused.value)


def test_an_installed_namesake_is_uninstalled_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(found.site, "getsitepackages", lambda: [str(tmp_path)])
    monkeypatch.setattr(found, "packages_distributions", lambda: {"megatron": ["other-megatron"]})
    text = str(found.namesake(tmp_path.resolve(), "why", NEWEST))
    assert text.endswith(f"; run pip uninstall other-megatron, then {PIP}")


def test_the_branch_that_is_named_holds_a_release_we_know(tmp_path: Path) -> None:
    """The command that is printed moves a checkout, dirty files apart, to another version."""
    make = "git init -q -b main && git add . && git -c user.name=a -c user.email=a@b commit -qm a"
    remote, checkout = tmp_path / "remote", tmp_path / "a checkout"
    for folder, files in ((remote, {**OLD, CORE: "__version__ = '0.19.5'"}), (checkout, NEW)):
        write(folder, files)
        subprocess.run(make, shell=True, cwd=folder, check=True)
    subprocess.run(["git", "branch", f"core_r{NEWEST}.0"], cwd=remote, check=True)
    (text,) = run_ranks(1, said, str(checkout), False)
    command = text.rpartition("; run ")[2].replace(found.REPOSITORY, f"'{remote}'")
    subprocess.run(command, shell=True, check=True, capture_output=True)
    assert run_ranks(1, said, str(checkout), False) == ["ok"]


@pytest.mark.megatron
@pytest.mark.newest  # older ones stand in PYTHONPATH, not where pip installs
def test_the_installed_one_is_where_pip_puts_it() -> None:
    spec = found.spec_of_core()
    assert spec is not None
    assert (found.folder_of(spec) / "megatron" / "core" / "__init__.py").is_file()
    assert found.get(NEWEST) == f"run {PIP}"
