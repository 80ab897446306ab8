"""What the plugin relies on in Megatron, verified by signature before anything is hooked."""

import dataclasses
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

from ep_plugin.config import ConfigError

_UNUSABLE = (ImportError, OSError, RuntimeError)  # the latter two: a library under it does not load


@dataclasses.dataclass(frozen=True)
class Touchpoint:
    """A symbol, `module:attribute.attribute`, and what must be true of it."""

    path: str
    needs: tuple[str, ...] = ()  # parameters in its signature; of a dataclass also fields
    base: str | None = None  # path of a class that it must derive from


def installed_version() -> str:
    """Return megatron.core's version, such as 0.19.2; raises ConfigError when there is none."""
    try:
        version: str = importlib.import_module("megatron.core").__version__
    except _UNUSABLE as error:
        raise ConfigError(
            f"Megatron cannot be imported ({error}); pip install 'ep-plugin[megatron]' would do"
        ) from error
    return version


def supported() -> dict[str, str]:
    """Return the releases with a table: "0.19" -> the table's module."""
    files = (Path(__file__).parent / "versions").glob("core_*.py")
    releases = sorted(tuple(map(int, file.stem.split("_")[1:])) for file in files)
    return {
        ".".join(map(str, release)): "ep_plugin.megatron.versions.core_"
        + "_".join(map(str, release))
        for release in releases
    }


def table_for(version: str) -> tuple[Touchpoint, ...]:
    """Return the touch points of a release; raises ConfigError when there is no table for it."""
    release = re.match(r"\d+\.\d+", version)
    tables = supported()
    if release is None or release.group() not in tables:
        raise ConfigError(
            f"megatron-core {version} has no touch-point table; supported are {', '.join(tables)}; "
            f"pip install 'megatron-core[training]=={list(tables)[-1]}.*' would do"
        )
    table: tuple[Touchpoint, ...] = importlib.import_module(tables[release.group()]).TOUCHPOINTS
    return table


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


def _find(path: str) -> Any:
    module, _, attributes = path.partition(":")
    symbol = importlib.import_module(module)
    for attribute in attributes.split("."):
        symbol = getattr(symbol, attribute)
    return symbol


def verify() -> tuple[Touchpoint, ...]:
    """Return the table of the installed Megatron; raises ConfigError listing every mismatch."""
    version = installed_version()
    table = table_for(version)
    found = problems(table)
    if found:
        raise ConfigError(
            f"megatron-core {version} does not match the plugin's table: {'; '.join(found)}; "
            "an unmodified release would do"
        )
    return table
