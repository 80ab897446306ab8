"""What the plugin relies on in Megatron, verified by signature before anything is hooked."""

import importlib
import inspect
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ep_plugin.config import ConfigError


@dataclass(frozen=True)
class Touchpoint:
    """A symbol, `module:attribute.attribute`, and the parameters that must be in its signature."""

    path: str
    needs: tuple[str, ...] = ()


def installed_version() -> str:
    """Return megatron.core's version, such as 0.19.2; raises ConfigError when there is none."""
    try:
        version: str = importlib.import_module("megatron.core").__version__
    except ImportError as error:
        raise ConfigError(
            f"Megatron is not installed ({error}); pip install 'ep-plugin[megatron]' would do"
        ) from error
    return version


def supported() -> dict[str, str]:
    """Return the releases with a table: "0.19" -> the table's module."""
    names = sorted(path.stem for path in (Path(__file__).parent / "versions").glob("core_*.py"))
    return {
        name.removeprefix("core_").replace("_", "."): f"ep_plugin.megatron.versions.{name}"
        for name in names
    }


def table_for(version: str) -> tuple[Touchpoint, ...]:
    """Return the touch points of a release; raises ConfigError when there is no table for it."""
    release = re.match(r"\d+\.\d+", version)
    tables = supported()
    if release is None or release.group() not in tables:
        raise ConfigError(
            f"megatron-core {version} has no touch-point table; supported are {', '.join(tables)}; "
            f"pip install 'megatron-core=={max(tables)}.*' would do"
        )
    table: tuple[Touchpoint, ...] = importlib.import_module(tables[release.group()]).TOUCHPOINTS
    return table


def problems(table: tuple[Touchpoint, ...]) -> list[str]:
    """Return one sentence for each touch point that the installed Megatron does not have."""
    return [text for text in map(_problem, table) if text is not None]


def _problem(touchpoint: Touchpoint) -> str | None:
    try:
        symbol = _find(touchpoint.path)
    except (ImportError, AttributeError) as error:
        return f"{touchpoint.path} is not there ({error})"
    if not touchpoint.needs:
        return None
    parameters = inspect.signature(symbol).parameters
    missing = [name for name in touchpoint.needs if name not in parameters]
    if missing:
        return f"{touchpoint.path} has no parameter {', '.join(missing)}; it has {', '.join(parameters)}"
    return None


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
