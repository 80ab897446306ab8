"""How ranks are laid out: the degrees of parallelism, validated once. Imports no torch."""

from dataclasses import dataclass
from math import gcd
from typing import Annotated

from ep_plugin.errors import ConfigError, largest_divisor
from ep_plugin.typed import Typed, Within
from ep_plugin.untrusted import shown

# Grids of ranks are lists.
Ranks = Annotated[int, Within(1, 1 << 18, "at least 1", "1")]
RanksOfNode = Annotated[
    int,
    Within(1, 1 << 16, "at least 1", "the number of GPUs of a node, such as <ranks_per_node=8>"),
]


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(Typed):
    """How `world_size` ranks are laid out; `order` lists the axes fastest first, as Megatron does.

    tp, cp, dp, pp lay out the dense part (dp follows from the rest); etp, ep, edp lay out the
    experts over the same ranks (edp follows). Raises ConfigError for a degree that is no positive
    integer, or does not divide.
    """

    world_size: Ranks
    tp: Ranks = 1
    pp: Ranks = 1
    cp: Ranks = 1
    ep: Ranks = 1
    etp: Ranks | None = None  # None: as tp, Megatron's default
    order: str = "tp-cp-ep-dp-pp"

    def __post_init__(self) -> None:
        if self.etp is None:
            object.__setattr__(self, "etp", self.tp)
        if sorted(self.order.split("-")) != ["cp", "dp", "ep", "pp", "tp"]:
            raise ConfigError(
                f"<order> must name each of tp, cp, ep, dp, pp once; got {shown(self.order)}; use "
                "<order=tp-cp-ep-dp-pp>"
            )
        self._check_product("tp*cp*pp", self.tp * self.cp * self.pp)
        if self.world_size % (self.ep * self.expert_tp * self.pp):
            per_stage = self.world_size // self.pp
            ep = largest_divisor(per_stage, self.ep)  # kept where it can be, at a smaller etp
            etp = largest_divisor(per_stage // ep, self.expert_tp)
            raise ConfigError(
                f"ep*etp*pp ({self.ep}*{self.etp}*{self.pp}) must divide <world_size> "
                f"({self.world_size}); use <ep={ep}> with <etp={etp}>"
                + ("" if self.etp != self.tp else " (etp defaults to tp)")
            )

    def _check_product(self, name: str, product: int) -> None:
        if self.world_size % product:
            raise ConfigError(
                f"{name} ({product}) must divide <world_size> ({self.world_size}); use "
                f"<world_size={product}>"
            )

    @property
    def expert_tp(self) -> int:
        assert self.etp is not None
        return self.etp

    @property
    def dp(self) -> int:
        return self.world_size // (self.tp * self.cp * self.pp)

    @property
    def edp(self) -> int:
        return self.world_size // (self.ep * self.expert_tp * self.pp)


def degree(ep: int, num_experts: int) -> int:
    """Return over how many of `ep` ranks a layer's experts are spread: the most that divide both.

    The ranks of an expert-parallel group are then `ep` / degree blocks, each with all the experts.
    """
    return gcd(ep, num_experts)


def check_experts_over_ranks(num_experts: int, ep: int) -> None:
    """Raise ConfigError unless every expert-parallel rank gets the same number of experts."""
    if num_experts % ep:
        raise ConfigError(
            f"<num_experts> ({num_experts}) must be divisible by <ep> ({ep}); use "
            f"<ep={largest_divisor(num_experts, ep)}>"
        )
