"""What a user asks of an upcycling, validated once. Nothing here imports torch."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from ep_plugin.checkpoint.adapt.gains import GateSums
from ep_plugin.errors import ConfigError, check_choice, largest_divisor
from ep_plugin.registry import available

MODES = "modes"
RouterInit = Literal["normal", "virtual-group", "zero"]
SharedFrom = Literal["none", "copy", "learned"]


@dataclass(frozen=True, kw_only=True)
class Upcycling:
    """What to make of the dense model. Raises ConfigError when settings contradict."""

    num_experts: int
    topk: int
    layers: str = "all"
    seed: int = 1234
    mode: str = "copy"
    granularity: int = 1  # experts that one dense FFN is cut into
    drop_ratio: float = 0.5  # of the channels of each expert, in mode drop
    noise_std: float = 0.01  # relative to the weights', in mode noise
    router_init: RouterInit = "normal"
    shared_expert: SharedFrom = "none"
    gates: GateSums = field(default_factory=GateSums)
    ep: int | None = None  # expert-parallel size of the run that continues; None: any above 1

    def __post_init__(self) -> None:
        check_choice("--mode", self.mode, available(MODES))
        check_choice("--router-init", self.router_init, get_args(RouterInit))
        check_choice("--shared-expert", self.shared_expert, get_args(SharedFrom))
        if self.num_experts < 2:
            raise ConfigError(f"--num-experts must be at least 2; got {self.num_experts}")
        if self.topk < 1:
            raise ConfigError(f"--topk must be at least 1; got {self.topk}; use --topk 2")
        if self.topk > self.num_experts:
            raise ConfigError(
                f"--topk ({self.topk}) must be at most --num-experts ({self.num_experts}); use "
                f"--topk {self.num_experts}"
            )
        self._check_granularity()
        if self.ep is not None and (self.ep < 1 or self.num_experts % self.ep):
            raise ConfigError(
                f"--ep ({self.ep}) must divide --num-experts ({self.num_experts}); use "
                f"--ep {largest_divisor(self.num_experts, self.ep)}"
            )
        if not 0 <= self.drop_ratio <= 1:
            raise ConfigError(
                f"--drop-ratio must be between 0 and 1; got {self.drop_ratio}; use 0.5"
            )
        if not 0 <= self.noise_std < float("inf"):
            raise ConfigError(
                f"--noise-std must be finite and not negative; got {self.noise_std}; use 0.01"
            )
        self.gates.check(self.topk, self.num_experts)

    def _check_granularity(self) -> None:
        parts = self.granularity
        if parts < 1 or (parts > 1) != (self.mode == "granular"):
            raise ConfigError(
                f"--granularity ({parts}) must be above 1 in --mode granular and 1 in the others; "
                f"--mode is {self.mode}; use --mode granular --granularity 4"
            )
        if self.num_experts % parts:
            raise ConfigError(
                f"--num-experts ({self.num_experts}) must be a multiple of --granularity "
                f"({parts}): whole copies of the FFN; use --num-experts {self.num_experts * parts}"
            )
        if self.router_init == "virtual-group" and self.topk % parts:
            raise ConfigError(
                f"--topk ({self.topk}) must be a multiple of --granularity ({parts}), so that "
                f"whole virtual groups are chosen; use --topk {-(-self.topk // parts) * parts}"
            )
        groups = self.gates.num_groups
        if groups and self.num_experts // groups % parts:
            raise ConfigError(
                f"each of the {groups} groups of experts must hold whole virtual groups of "
                f"{parts}; use --num-experts {groups * parts}"
            )
