"""What two runs computed, number by number."""

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ep_plugin.checkpoint.formats.megatron_dist import FIRST_ITERATION, open_checkpoint
from ep_plugin.errors import ConfigError

Scalars = dict[int, dict[str, float]]  # iteration -> name -> value


@dataclass(frozen=True)
class Difference:
    """One number, or the gradient of one parameter or expert, at a layout and on one rank."""

    name: str
    iteration: int
    relative: float  # |a - b| / |a|; of gradients with Euclidean norms
    ratio: float | None  # of gradients: b's part along a, over |a|

    @property
    def text(self) -> str:
        ratio = "" if self.ratio is None else f", {self.ratio:.4g} times one rank's along it"
        return f"{self.name} at iteration {self.iteration} (relative {self.relative:.1e}{ratio})"


@dataclass
class Comparison:
    """A layout against one rank."""

    layout: str
    ranks: int
    tolerance: float
    grad_tolerance: float
    scalars: list[Difference] = field(default_factory=list)
    gradients: list[Difference] = field(default_factory=list)
    resumed: list[Difference] = field(default_factory=list)
    failure: str | None = None  # why a run at the layout did not finish

    @property
    def first(self) -> Difference | None:
        """Return the first that differs: gradients in the order of the forward, then numbers."""
        wrong = [d for d in self.gradients if not d.relative <= self.grad_tolerance]
        wrong += [d for d in [*self.scalars, *self.resumed] if not d.relative <= self.tolerance]
        return min(wrong, key=lambda d: d.iteration, default=None)

    @property
    def passed(self) -> bool:
        return self.first is None and self.failure is None

    def as_dict(self) -> dict[str, Any]:
        first = self.first
        return {
            "passed": self.passed,
            **asdict(self),
            "first_difference": None if first is None else asdict(first),
        }


def read_scalars(folder: Path) -> Scalars:
    """Return what a run wrote of its iterations."""
    content = json.loads((folder / "scalars.json").read_text())
    return {int(iteration): values for iteration, values in content.items()}


def compare_scalars(one: Scalars, other: Scalars) -> list[Difference]:
    """Return the difference of every number that `one` has, at the iterations that `other` ran."""
    found = []
    for iteration in sorted(one.keys() & other.keys()):
        for name, expected in one[iteration].items():
            value = other[iteration].get(name, float("nan"))
            scale = max(abs(expected), 1e-12)
            found.append(Difference(name, iteration, abs(value - expected) / scale, None))
    return found


def compare_gradients(one: Path, other: Path) -> list[Difference]:
    """Return the difference of every parameter's gradient, and every expert's, forward order.

    Raises ConfigError where a vocabulary is padded otherwise.
    """
    old, new = (open_checkpoint(run / "gradients" / FIRST_ITERATION) for run in (one, other))
    found = []
    for name in sorted(old.tensors, key=_forward_order):
        expected = old.read_tensor(name).double()
        value = new.read_tensor(name).double() if name in new.tensors else expected * torch.nan
        if value.shape != expected.shape:
            raise ConfigError(
                f"{name} has {len(expected)} rows on one rank and {len(value)} at this layout: "
                "Megatron pads a vocabulary to a multiple of --make-vocab-size-divisible-by times "
                "TP, and losses of different vocabularies differ; use --padded-vocab-size "
                f"{max(len(value), len(expected))}"
            )
        for label, a, b in _by_expert(name, expected, value):
            scale = max(float(a.norm()), 1e-12)
            ratio = float((a * b).sum()) / scale**2
            found.append(Difference(label, 1, float((a - b).norm()) / scale, ratio))
    return found


def _by_expert(name: str, one: Tensor, other: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
    if ".experts.experts." not in name:
        yield name, one, other
        return
    for expert, (a, b) in enumerate(zip(one, other, strict=True)):
        yield f"{name}[{expert}]", a, b


def _forward_order(name: str) -> tuple[int, int, str]:
    """Order embedding, layers by number, and what follows them."""
    layer = re.match(r"decoder\.layers\.(\d+)\.", name)
    if layer:
        return 1, int(layer[1]), name
    return (0 if name.startswith("embedding") else 2), 0, name
