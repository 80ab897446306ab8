"""A choice is a folder, an option is a file.

`alltoall.py` in the folder of dispatchers is the option `alltoall` of the choice `dispatcher`; it
exports `build(...)`. `HOME` says which folder a choice is. Names are listed from the folder without
importing anything, so an option's dependencies are needed only by those who choose it. A name with
a dot is the user's own module and is imported as it is.
"""

import pkgutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from ep_plugin.errors import BackendUnavailable, ConfigError
from ep_plugin.typed import NAME
from ep_plugin.untrusted import shown

# choice -> its folder, below ep_plugin
HOME = {
    "router": "moe.router",
    "dispatcher": "moe.dispatcher",
    "gemm": "moe.experts.gemm",
    "fp8": "moe.experts.fp8",
    "overlap": "moe.schedule",
    "presets": "presets",
    "families": "checkpoint.families",
    "formats": "checkpoint.formats",
    "modes": "checkpoint.adapt.modes",
}


def available(kind: str) -> tuple[str, ...]:
    """Return the names of all options of `kind`, sorted; nothing is imported."""
    folder = Path(__file__).parent.joinpath(*HOME[kind].split("."))
    names = (module.name for module in pkgutil.iter_modules([str(folder)]))
    return tuple(sorted(name for name in names if not name.startswith("_")))


def resolve(kind: str, name: str) -> Callable[..., Any]:
    """Return the `build` function of option `name`.

    Raises ConfigError for an unknown name and a module without `build`, BackendUnavailable when the
    option's package is missing or does not load, as one that was built for another torch.
    """
    if not (isinstance(name, str) and NAME.fullmatch(name)):
        raise ConfigError(
            f"{kind} must be one of {', '.join(available(kind))}, or a module of your own such as "
            f"my_package.my_option; got {shown(name)}"
        )
    for folder in (kind, HOME[kind]):  # one of ours, in full; the first is its public name
        name = name.removeprefix(f"ep_plugin.{folder}.")
    if "." not in name and name not in available(kind):
        raise ConfigError(f"unknown {kind} {shown(name)}; choose from {', '.join(available(kind))}")
    path = f"ep_plugin.{HOME[kind]}.{name}" if "." not in name else name
    try:
        module = import_module(path)
    except (ImportError, OSError) as error:
        raise BackendUnavailable(
            f"{kind} {shown(name)} needs a package that is not here or does not load ({error}); "
            f"install it as its README says, or choose from "
            f"{', '.join(n for n in available(kind) if n != name)}"
        ) from error
    build: Callable[..., Any] | None = getattr(module, "build", None)
    if not callable(build):
        raise ConfigError(
            f"{kind} {shown(name)} has no function `build`, which an option is made with; use a "
            "module that has one, as docs/extending.md shows"
        )
    return build
