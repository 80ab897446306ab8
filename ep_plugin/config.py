"""What a user can set, validated once. Nothing here imports torch.

A mistake of the user's is a `ConfigError`: found before any communication, on every rank alike,
with the rule, the names, the values and a legal alternative in its message.
"""

from dataclasses import dataclass
from typing import Literal, get_args

Activation = Literal["swiglu", "geglu", "gelu", "relu"]
Normalize = Literal["topk", "none"]
RouterDtype = Literal["fp32", "fp64"]


class ConfigError(ValueError):
    """A setting the user can change. Commands print it as one sentence and exit with code 2."""


class BackendUnavailable(ConfigError):
    """A named option exists but its package is not installed."""


def largest_divisor(value: int, at_most: int) -> int:
    """Return the largest divisor of `value` that is at most `at_most`."""
    return next(d for d in range(max(1, min(value, at_most)), 0, -1) if value % d == 0)


def check_choice(name: str, value: str, legal: tuple[str, ...]) -> None:
    """Raise ConfigError unless `value` is one of `legal`."""
    if value not in legal:
        raise ConfigError(f"{name} must be one of {', '.join(legal)}; got {value!r}")


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """One Mixture-of-Experts block.

    Raises ConfigError when the settings contradict each other.
    """

    hidden_size: int
    ffn_hidden_size: int  # of one expert
    num_experts: int
    topk: int = 2
    activation: Activation = "swiglu"
    bias: bool = False  # in the experts and in the router
    normalize: Normalize = "topk"  # "topk": chosen probs sum to 1; "none": softmax over all experts
    router_dtype: RouterDtype = "fp32"
    aux_loss_coeff: float = 0.0  # Switch Transformer, eq. 4
    z_loss_coeff: float = 0.0  # ST-MoE, eq. 5
    router: str = "topk"
    dispatcher: str = "auto"
    gemm: str = "auto"

    def __post_init__(self) -> None:
        for name in ("hidden_size", "ffn_hidden_size", "num_experts", "topk"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.topk > self.num_experts:
            raise ConfigError(
                f"topk ({self.topk}) must be at most num_experts ({self.num_experts}); "
                f"topk = {self.num_experts} would do"
            )
        check_choice("activation", self.activation, get_args(Activation))
        check_choice("normalize", self.normalize, get_args(Normalize))
        check_choice("router_dtype", self.router_dtype, get_args(RouterDtype))
        for name in ("aux_loss_coeff", "z_loss_coeff"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative; got {getattr(self, name)}")

    @property
    def gated(self) -> bool:
        """Whether the activation has a gate half, so that fc1 has 2 * ffn_hidden_size outputs."""
        return self.activation in ("swiglu", "geglu")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How `world_size` ranks are laid out; `order` lists the axes fastest first, as Megatron does.

    tp, cp, dp, pp lay out the dense part (dp follows from the rest); etp, ep, edp lay out the
    experts over the same ranks (edp follows). Raises ConfigError when a degree does not divide.
    """

    world_size: int
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int | None = None  # None: as tp, Megatron's default
    order: str = "tp-cp-ep-dp-pp"

    def __post_init__(self) -> None:
        if self.etp is None:
            object.__setattr__(self, "etp", self.tp)
        for name in ("world_size", "tp", "pp", "cp", "ep", "etp"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1; got {getattr(self, name)}")
        if sorted(self.order.split("-")) != ["cp", "dp", "ep", "pp", "tp"]:
            raise ConfigError(
                f"order must name each of tp, cp, ep, dp, pp once; got {self.order!r}; "
                "tp-cp-ep-dp-pp would do"
            )
        self._check_product("tp*cp*pp", self.tp * self.cp * self.pp)
        if self.world_size % (self.ep * self.expert_tp * self.pp):
            per_stage = self.world_size // self.pp
            etp = largest_divisor(per_stage, self.expert_tp)
            ep = largest_divisor(per_stage // etp, self.ep)
            raise ConfigError(
                f"ep*etp*pp ({self.ep}*{self.etp}*{self.pp}) must divide world_size "
                f"({self.world_size}); ep = {ep} with etp = {etp} would do"
                + ("" if self.etp != self.tp else " (etp defaults to tp)")
            )

    def _check_product(self, name: str, product: int) -> None:
        if self.world_size % product:
            raise ConfigError(
                f"{name} ({product}) must divide world_size ({self.world_size}); "
                f"world_size = {product} would do"
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


def check_experts_over_ranks(num_experts: int, ep: int) -> None:
    """Raise ConfigError unless every expert-parallel rank gets the same number of experts."""
    if num_experts % ep:
        raise ConfigError(
            f"num_experts ({num_experts}) must be divisible by ep ({ep}); "
            f"ep = {largest_divisor(num_experts, ep)} would do"
        )
