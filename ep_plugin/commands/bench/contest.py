"""Who takes part in a run, and what became of those who cannot."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from ep_plugin.commands.bench.figures import EMPTY, Row, device_name, identity
from ep_plugin.commands.bench.floors import GRADIENTS, H100, Gradients, Precision, Rates
from ep_plugin.commands.bench.measure import Protocol
from ep_plugin.errors import BackendUnavailable, ConfigError
from ep_plugin.extras import pip_install

OURS = "ep_plugin"
DROPPING = "drop_and_pad"  # in the name of a way of Megatron that drops rows: another layer
INSTALL = {  # what a peer's file imports
    "megatron": pip_install("megatron", "te"),
    "sonicmoe": "pip install sonic-moe",
    "liger": "pip install liger-kernel",
    "veomni": "pip install veomni",
    "torchtitan": "pip install torchtitan",
    "deepspeed": "pip install deepspeed",
    "deepgemm": "pip install sgl-deep-gemm",
    "transformer_engine": pip_install("te"),
}
# What a peer's code may raise: it is not ours, and one that breaks must not end the others' run.
FAILURES = (
    *(AssertionError, AttributeError, ImportError, OSError, RuntimeError, TypeError, ValueError),
)


def peer(name: str) -> Callable[..., Any]:
    """Return the `build` of a peer; raises BackendUnavailable when its package is missing."""
    try:
        build: Callable[..., Any] = import_module(f"ep_plugin.commands.bench.peers.{name}").build
    except ImportError as error:
        raise BackendUnavailable(
            f"{name} needs a package that is not here ({error}); run {INSTALL[name]}"
        ) from error
    return build


@dataclass
class Contest:
    """The settings of a run, the rows it need not measure, and who is absent and why."""

    protocol: Protocol
    precisions: tuple[Precision, ...]
    backends: tuple[str, ...] = ()  # asked for by name; none: all there are
    cuda_graph: bool = False
    kept: list[Row] = field(default_factory=list)  # measured before
    recipes: tuple[str, ...] = ()  # of bench overlap, as are these; none: all there are
    dispatchers: tuple[str, ...] = ()
    gradients: tuple[Gradients, ...] = GRADIENTS
    rates: Rates = H100  # of the device, for floors
    skip: tuple[str, ...] = ()  # backends to leave out
    absent: dict[tuple[str, str], list[Precision]] = field(default_factory=dict)  # with reason

    def entries(self, names: Iterable[str]) -> list[tuple[str, Precision]]:
        """Return name and precision of each of `names` that takes part."""
        asked = [name for name in names if not self.backends or name in self.backends]
        chosen = [name for name in asked if name not in self.skip]
        return [(name, precision) for name in chosen for precision in self.precisions]

    @contextmanager
    def attempt(
        self, name: str, precision: Precision, one_of_several: bool = False
    ) -> Iterator[None]:
        """Note why a backend cannot run, so that the others do.

        A package that is missing is raised where the backend was asked for by name, unless it is
        `one_of_several` ways to run it. Of this package's own errors only ConfigError is noted.
        """
        failures = (ConfigError,) if name.startswith(OURS) else FAILURES
        try:
            yield
        except failures as error:
            missing = isinstance(error, BackendUnavailable)
            if missing and name in self.backends and not one_of_several:
                raise
            kind = "" if isinstance(error, ConfigError) else f"{type(error).__name__}: "
            first_line = str(error).partition("\n")[0]
            self.note(name, precision, kind + first_line)

    def note(self, name: str, precision: Precision, reason: str) -> None:
        """Remember why a backend has no row; once for all shapes."""
        precisions = self.absent.setdefault((name, reason), [])
        if precision not in precisions:
            precisions.append(precision)

    def absentees(self) -> list[str]:
        """Return a line for each backend that could not run, with the reason."""
        return [f"{name} ({', '.join(ps)}): {why}" for (name, why), ps in self.absent.items()]

    def has(self, **fields: object) -> bool:
        """Whether a row of such an identity was measured before, on this device."""
        row = {**EMPTY, "device": device_name(self.protocol.device), **fields}
        return identity(row) in {identity(other) for other in self.kept}
