"""What a user asks of an upcycling, validated once, and the gain that its gates call for.

Nothing here imports torch.

The experts' outputs are weighted by the gates, so an upcycled layer starts at G times the dense
output, G the sum of a token's k gates:

    weights divided by their sum             G = S          S the scaling factor; always exact
    softmax over all E experts, top-k        G = S * k / E  with a zero router; else only about
    sigmoid, not divided by their sum        G = S * k / 2  with a zero router; else only about

The gain 1 / G (g / G for g shards of an FFN, `modes/granular.py`) is exact in the first case and
with a zero router; elsewhere the report states the deviation. Megatron divides by the sum except
under --moe-router-pre-softmax, which it demands for top-1 softmax, and for top-1 sigmoid.

Where the gain goes. Put on fc2 alone, one matrix of the expert would be off the scale of the other;
arXiv:2410.07524 (section 3) therefore spreads it over the matrices, and scales the gate of SwiGLU
as well. SwiGLU is act(gate(x)) * value(x): linear in the value, but act(s * z) is not s * act(z),
so scaling the gate would change the function. Hence, exactly, for a gated FFN

    value half of fc1 (and its bias) * a,    fc2 * gain / a,    a = 2 ** floor(log2(gain) / 2)

near the square root; a power of two, so no value half is rounded, and with a gain that is one fc2
is not either, bf16 included. An FFN without gate has no linear part before fc2: all of it there.
"""

import argparse
import copy
import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from ep_plugin.checkpoint.moe_layers import parse_layers
from ep_plugin.checkpoint.normalized import divided
from ep_plugin.checkpoint.scopes import SCOPES
from ep_plugin.errors import ConfigError, check_choice, largest_divisor
from ep_plugin.moe.routing_config import AuxLossCounts, RoutingConfig, ScoreFunction
from ep_plugin.registry import available
from ep_plugin.typed import Typed

MODES = "modes"
RouterInit = Literal["normal", "virtual-group", "zero"]
SharedFrom = Literal["none", "copy", "learned"]


@dataclass(frozen=True, kw_only=True)
class GateSums(Typed):
    """How a router's scores become weights, in Megatron's terms."""

    score_function: ScoreFunction = "softmax"
    pre_softmax: bool = False  # softmax over all experts before the choice, not divided by the sum
    scaling_factor: float = 1.0
    num_groups: int | None = None
    group_topk: int | None = None
    expert_bias: bool = False

    @classmethod
    def of(cls, routing: RoutingConfig) -> "GateSums":
        """Return what a preset's routing means here."""
        return cls(
            score_function=routing.score_function,
            pre_softmax=routing.score_function == "softmax" and routing.normalize == "none",
            scaling_factor=routing.scaling_factor,
            num_groups=routing.num_groups,
            group_topk=routing.group_topk,
            expert_bias=routing.expert_bias,
        )

    def check(self, topk: int, num_experts: int) -> None:
        """Raise ConfigError for gates that no Megatron run can have."""
        if not 0 < self.scaling_factor <= 1e6:
            raise ConfigError(
                f"--scaling-factor must be above 0 and at most 1e6; got {self.scaling_factor:g}; "
                "use --scaling-factor 1"
            )
        if self.score_function == "softmax" and topk == 1 and not self.pre_softmax:
            raise ConfigError(
                "--topk 1 divided by its own sum leaves the router no gradient, so Megatron "
                "demands --pre-softmax for it; use --topk 1 --pre-softmax"
            )
        if self.pre_softmax and self.score_function != "softmax":
            raise ConfigError(
                f"--pre-softmax is of softmax, and --score-function is {self.score_function}; use "
                "--score-function softmax, or leave --pre-softmax out"
            )
        RoutingConfig(
            topk=topk,
            score_function=self.score_function,
            normalize="before_drop" if self.normalized(topk) else "none",
            scaling_factor=self.scaling_factor,
            num_groups=self.num_groups,
            group_topk=self.group_topk,
        ).check_experts(num_experts)

    def normalized(self, topk: int) -> bool:
        """Whether a token's weights are divided by their sum."""
        return divided(self.score_function, self.pre_softmax, topk)

    def sum(self, topk: int, num_experts: int) -> float:
        """Return G, exact or about."""
        if self.normalized(topk):
            return self.scaling_factor
        mean = 0.5 if self.score_function == "sigmoid" else 1 / num_experts
        return self.scaling_factor * topk * mean

    def deviation(self, topk: int, zero_router: bool) -> str | None:
        """Return why G is not known exactly; None when it is."""
        if self.normalized(topk) or zero_router:
            return None
        return (
            f"{self.score_function} gates that are not divided by their sum add up to another "
            "value for each token; experts are scaled for the value of equal logits "
            "(--router-init zero makes it exact)"
        )


@dataclass(frozen=True, kw_only=True)
class Losses(Typed):
    """What keeps the router balanced in the run that continues, in Megatron's terms.

    The default is the strength of Switch Transformer (arXiv:2101.03961, section 2.2).
    """

    kind: str = "aux_loss"
    coefficient: float = 1e-2
    further: tuple[tuple[str, float], ...] = ()  # beside it: kind, coefficient
    z_coefficient: float = 0.0
    counts: AuxLossCounts = "topk"

    @classmethod
    def of(cls, routing: RoutingConfig) -> "Losses":
        """Return what a preset's routing means here; routing groups are the run's own."""
        losses = [(SCOPES[scope], coefficient) for scope, coefficient in routing.balancing_losses]
        (kind, coefficient), *further = losses or [("none", 0.0)]
        return cls(
            kind=kind,
            coefficient=coefficient,
            further=tuple(further),
            z_coefficient=routing.z_loss_coeff,
            counts=routing.aux_loss_counts,
        )


@dataclass(frozen=True)
class Gain:
    """Factors of an expert's tensors."""

    value: float  # of fc1's value half, weight and bias
    weight: float  # of the weight of fc2
    bias: float  # of the bias of fc2


def divide(gain: float, bias: float, gated: bool) -> Gain:
    """Return where an output gain goes; `bias` is that of the bias of fc2."""
    value = 2.0 ** math.floor(math.log2(gain) / 2) if gated else 1.0
    return Gain(value=value, weight=gain / value, bias=bias)


@dataclass(frozen=True, kw_only=True)
class Upcycling(Typed):
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
    losses: Losses = field(default_factory=Losses)
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

    def arguments(self, dense: argparse.Namespace) -> argparse.Namespace:
        """Return the run arguments of the new model from the dense one's.

        Raises ConfigError for `layers` that the dense model does not have.
        """
        args, gates = copy.copy(dense), self.gates
        args.num_experts = self.num_experts
        args.moe_router_topk = self.topk
        args.moe_layer_freq = parse_layers(self.layers, dense.num_layers)
        args.moe_ffn_hidden_size = args.ffn_hidden_size // self.granularity
        # What the sum of the gates rests on.
        args.moe_router_score_function = gates.score_function
        args.moe_router_pre_softmax = gates.pre_softmax
        args.moe_router_topk_scaling_factor = None
        if gates.scaling_factor != 1:
            args.moe_router_topk_scaling_factor = gates.scaling_factor
        if gates.num_groups is not None:
            args.moe_router_num_groups = gates.num_groups
            args.moe_router_group_topk = gates.group_topk
        if gates.expert_bias:
            args.moe_router_enable_expert_bias = True
        args.moe_router_load_balancing_type = self.losses.kind
        args.moe_aux_loss_coeff = self.losses.coefficient
        if further := self.losses.further:
            args.moe_router_load_balancing_type = [self.losses.kind, *(k for k, _ in further)]
            args.moe_aux_loss_coeff = [self.losses.coefficient, *(c for _, c in further)]
        if self.losses.z_coefficient:
            args.moe_z_loss_coeff = self.losses.z_coefficient
        if self.losses.counts != "topk":
            args.ep_aux_loss_counts = self.losses.counts
        if self.shared_expert != "none":
            args.moe_shared_expert_intermediate_size = args.ffn_hidden_size
        if self.shared_expert == "learned":
            args.ep_shared_expert = "learned"
        return args

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
