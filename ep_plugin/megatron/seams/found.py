"""The Megatron that Python finds: where it is, whose it is, and how to get one that we know.

`megatron.core` is not imported here: a package that only has the name is told from its place.
"""

import shlex
import site
import sys
import sysconfig
from importlib.machinery import ModuleSpec
from importlib.metadata import packages_distributions
from importlib.util import find_spec
from pathlib import Path

from ep_plugin.errors import ConfigError

REPOSITORY = "https://github.com/NVIDIA/Megatron-LM"


def spec_of_core() -> ModuleSpec | None:
    """Return where `megatron.core` would be imported from; None where there is none."""
    try:
        return find_spec("megatron.core")
    except Exception:  # `megatron` is run for it: of another project, anything may be wrong there
        return None


def folder_of(spec: ModuleSpec) -> Path:
    """Return the folder on Python's path that holds a module's outermost package."""
    places = list(spec.submodule_search_locations or []) or [spec.origin or ""]
    return Path(places[0]).parents[spec.name.count(".")].resolve()


def absent(release: str) -> ConfigError:
    """Return the error for no `megatron.core`; `release`, such as 0.19, is the one to install."""
    spec = find_spec("megatron")
    if spec is None:
        return ConfigError(
            f"Megatron is not installed in {sys.prefix}; run {pip(release)}, or put the folder of "
            "a Megatron-LM checkout into PYTHONPATH"
        )
    return namesake(folder_of(spec), "it has no megatron.core", release)


def namesake(folder: Path, why: str, release: str) -> ConfigError:
    """Return the error for another project's package `megatron` in `folder`."""
    text = f"the package megatron in {folder} is another project's ({why}), which cannot be served"
    if not is_installed(folder):
        return ConfigError(f"{text}; {_leave(folder)} and have NVIDIA's instead: {pip(release)}")
    owners = [name for name in packages_distributions().get("megatron", []) if "core" not in name]
    remove = f"run pip uninstall {' '.join(sorted(set(owners)))}" if owners else "remove it"
    return ConfigError(f"{text}; {remove}, then {pip(release)}")


def get(release: str, force: bool = False) -> str:
    """Return what to do, in place of the Megatron found, to have an unmodified `release`.

    A checkout is moved to a branch, a wheel is installed anew; pip changes nothing in a checkout.
    """
    spec = spec_of_core()
    if spec is None:
        return f"run {pip(release)}"
    folder = folder_of(spec)
    if is_checkout(folder):
        git = f"git -C {shlex.quote(str(folder))}"
        return f"run {git} fetch {REPOSITORY} core_r{release}.0 && {git} checkout FETCH_HEAD"
    if is_installed(folder):
        return f"run {pip(release, *(['--force-reinstall', '--no-deps'] if force else []))}"
    return f"{_leave(folder)}, and run {pip(release)}"


def pip(release: str, *options: str) -> str:
    """Return the command that installs the wheel of a release."""
    return " ".join(["pip install", *options, f"'megatron-core[training]=={release}.*'"])


def is_checkout(folder: Path) -> bool:
    """Whether `folder` is that of a git checkout, and no package's in somebody else's."""
    return (folder / ".git").exists()


def is_installed(folder: Path) -> bool:
    """Whether pip installs into `folder`, and Python looks there without PYTHONPATH."""
    paths = sysconfig.get_paths()
    folders = {paths["purelib"], paths["platlib"], *site.getsitepackages()}
    return folder in {Path(name).resolve() for name in (*folders, site.getusersitepackages())}


def _leave(folder: Path) -> str:
    """Return how Python comes to look elsewhere than in `folder`, where it does not always."""
    if sys.path and Path(sys.path[0]).resolve() == folder:
        return f"start a script that lies outside {folder}"
    return f"leave {folder} out of PYTHONPATH"
