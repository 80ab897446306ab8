"""What the plugin relies on in Megatron, verified by signature before anything is hooked."""

import dataclasses
import importlib
import importlib.util
import inspect
import re
from pathlib import Path
from typing import Any

from ep_plugin.errors import ConfigError
from ep_plugin.megatron.seams import found

_TRAINING = "megatron.training"
_UNUSABLE = (ImportError, OSError, RuntimeError)  # the latter two: a library under it does not load


@dataclasses.dataclass(frozen=True)
class Touchpoint:
    """A symbol, `module:attribute.attribute`, and what must be true of it."""

    path: str
    needs: tuple[str, ...] = ()  # parameters in its signature; of a dataclass also fields
    base: str | None = None  # path of a class that it must derive from


def installed_version() -> str:
    """Return megatron.core's version, such as 0.19.2; raises ConfigError when there is none."""
    to_install = newest()
    spec = found.spec_of_core()
    if spec is None:
        raise found.absent(to_install)
    folder = found.folder_of(spec)
    try:
        version = getattr(importlib.import_module("megatron.core"), "__version__", None)
    except _UNUSABLE as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        theirs = missing is not None and missing.partition(".")[0] != "megatron"
        remedy = f"run pip install {missing}" if theirs else found.get(to_install, force=True)
        raise ConfigError(
            f"the Megatron in {folder} cannot be imported ({error}); {remedy}"
        ) from error
    if not isinstance(version, str):
        raise found.namesake(folder, "its megatron.core has no version", to_install)
    return version


def supported() -> dict[str, str]:
    """Return the releases with a table: "0.19" -> the table's module."""
    files = (Path(__file__).parents[1] / "versions").glob("core_*.py")
    releases = sorted(tuple(map(int, file.stem.split("_")[1:])) for file in files)
    return {
        ".".join(map(str, release)): "ep_plugin.megatron.versions.core_"
        + "_".join(map(str, release))
        for release in releases
    }


def newest() -> str:
    """Return the newest release to install, such as 0.19: the last that is not in development."""
    tables = reversed(supported().items())
    return next(name for name, at in tables if importlib.import_module(at).EXPERIMENTAL is None)


def experimental(version: str) -> str | None:
    """Return a sentence for a Megatron in development; None for a release."""
    commit = release_for(version).EXPERIMENTAL
    if commit is None:
        return None
    return (
        f"megatron-core {version} is in development and experimental here: tested at commit "
        f"{commit} of Megatron-LM, on the CPU; the newest release is {newest()}"
    )


def release_for(version: str) -> Any:
    """Return the module of a release in `versions/`; raises ConfigError when there is none."""
    release = re.match(r"\d+\.\d+", version)
    tables = supported()
    if release is None or release.group() not in tables:
        raise ConfigError(
            f"megatron-core {version} is none that the plugin knows; supported are "
            f"{', '.join(tables)}; {found.get(newest())}"
        )
    return importlib.import_module(tables[release.group()])


def table_for(version: str) -> tuple[Touchpoint, ...]:
    """Return the touch points of a release; raises ConfigError when there is no table for it."""
    table: tuple[Touchpoint, ...] = release_for(version).TOUCHPOINTS
    return table


def has_training() -> bool:
    """Whether `megatron.training` can be imported: a wheel of 0.16 has `megatron.core` alone."""
    return importlib.util.find_spec(_TRAINING) is not None


def problems(table: tuple[Touchpoint, ...]) -> list[str]:
    """Return one sentence for each touch point that the installed Megatron does not have."""
    return [text for text in map(_problem, table) if text is not None]


def _problem(touchpoint: Touchpoint) -> str | None:
    path = touchpoint.path
    try:
        symbol = _find(path)
        base = _find(touchpoint.base) if touchpoint.base else object
        names = _parameters(symbol) if touchpoint.needs else []
    except (*_UNUSABLE, AttributeError) as error:
        return f"{path} is not there ({error})"
    except (TypeError, ValueError) as error:
        return f"{path} has no signature ({error})"
    missing = [name for name in touchpoint.needs if name not in names]
    if missing:
        return f"{path} has no parameter {', '.join(missing)}; it has {', '.join(names)}"
    if base is not object and not issubclass(symbol, base):
        return f"{path} does not derive from {touchpoint.base}"
    return None


def _parameters(symbol: Any) -> list[str]:
    fields = dataclasses.fields(symbol) if dataclasses.is_dataclass(symbol) else ()
    return [*inspect.signature(symbol).parameters, *(field.name for field in fields)]


def find_owner(path: str) -> tuple[Any, str]:
    """Return what owns the attribute at the end of `module:attribute.attribute`, and its name."""
    module, _, attributes = path.partition(":")
    *owners, name = attributes.split(".")
    owner: Any = importlib.import_module(module)
    for attribute in owners:
        owner = getattr(owner, attribute)
    return owner, name


def _find(path: str) -> Any:
    return getattr(*find_owner(path))


def verify() -> tuple[Touchpoint, ...]:
    """Return the table of the installed Megatron; raises ConfigError listing every mismatch.

    Touch points in `megatron.training` count where it is installed.
    """
    version = installed_version()
    table = table_for(version)
    if has_training():
        _check_one_megatron(version)
    else:
        table = tuple(touchpoint for touchpoint in table if _TRAINING not in touchpoint.path)
    off = problems(table)
    if off and (about := experimental(version)) is not None:
        raise ConfigError(
            f"{about}; this one is another: {'; '.join(off)}; check out that commit, or "
            f"{found.get(newest())}"
        )
    if off:
        release = ".".join(version.split(".")[:2])
        raise ConfigError(
            f"megatron-core {version} is not as it was released: {'; '.join(off)}; for an "
            f"unmodified one {found.get(release, force=True)}"
        )
    return table


def _check_one_megatron(version: str) -> None:
    """Raise ConfigError when `megatron` is put together from two installations.

    It is a namespace package: what one folder on Python's path lacks is taken from the next.
    """
    core, training = (_folder(name) for name in ("megatron.core", _TRAINING))
    if core != training:
        raise ConfigError(
            f"megatron.core ({version}) is taken from {core} and megatron.training from "
            f"{training}; leave one of these folders out of PYTHONPATH, or uninstall it"
        )


def _folder(package: str) -> Path:
    """Return the folder that holds the one of the package's name."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    return Path((spec.submodule_search_locations or [""])[0]).parent.resolve()
