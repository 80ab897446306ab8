"""The gates: what a token's weights sum to, and the gain that makes up for it.

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

import math
from dataclasses import dataclass

from ep_plugin.errors import ConfigError
from ep_plugin.moe.routing_config import RoutingConfig, ScoreFunction


@dataclass(frozen=True, kw_only=True)
class GateSums:
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
        return topk > 1 if self.score_function == "sigmoid" else not self.pre_softmax

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
