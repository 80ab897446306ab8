"""What `ep-plugin plan` has a row for: measured exchanges, layouts, and kinds of layers."""

from dataclasses import dataclass
from typing import Annotated

from ep_plugin.commands.plan.memory import Memory
from ep_plugin.commands.plan.taught import Taught
from ep_plugin.moe.parallel import Ranks
from ep_plugin.typed import Typed, Within

Milliseconds = Annotated[float, Within(1e-9, 1e9, "positive and finite")]
Share = Annotated[float, Within(-1e3, 1.0, "a share, 1 at most")]


@dataclass(frozen=True)
class Measured(Typed):
    """An exchange of a step as it was measured."""

    ep: Ranks
    how: str
    exchange_ms: Milliseconds
    hidden_share: Share


@dataclass(frozen=True)
class Fit:
    """The fullest stage of a layout."""

    ep: int
    edp: int
    memory: Memory
    total_gb: float
    fits: bool
    teacher: Taught | None = None  # counted in the total, until it is gone


@dataclass(frozen=True)
class Kind:
    """All layers of a kind in the whole model."""

    symbol: str
    name: str
    layers: int
    params: int
    flops: float  # of a token's forward
    trained_flops: float  # of its step: forward, backward, and what is recomputed


@dataclass(frozen=True)
class Held:
    """What one GPU holds for a kind of layer: parameters, and bytes."""

    symbol: str
    params: int
    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class HybridFit:
    """The fullest stage of a layout, kind by kind."""

    ep: int
    edp: int
    stage: int
    kinds: tuple[Held, ...]
    total_gb: float
    fits: bool
