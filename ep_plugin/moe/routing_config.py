"""How tokens choose experts, validated once. Nothing here imports torch."""

from dataclasses import dataclass
from math import nextafter
from sys import float_info
from typing import Annotated, Literal

from ep_plugin.errors import ConfigError, largest_divisor
from ep_plugin.typed import LARGEST_INT, Typed, Within

ScoreFunction = Literal["softmax", "sigmoid"]
Normalize = Literal["before_drop", "after_drop", "none"]
RouterDtype = Literal["fp32", "fp64", "model"]
Noise = Literal["none", "rsample"]
SecondExpert = Literal["all", "sampling", "random", "threshold"]
DropPolicy = Literal["none", "position", "rank_position", "probs", "random", "bpr"]
CapacityRounding = Literal["floor", "round", "ceil", "floor_x4"]
AuxLossCounts = Literal["topk", "top1"]
AuxLossScope = Literal["micro_batch", "sequence", "global", "group"]
AuxLossLayers = Literal["sum", "mean"]

_UNGROUPED = "<num_groups=None> with <group_topk=None>"
MOST_EXPERTS = 1 << 20  # of a layer: some refusals look for a number of experts that goes
Chosen = Annotated[int, Within(1, MOST_EXPERTS)]
Groups = Annotated[int, Within(1, MOST_EXPERTS, use=_UNGROUPED)]
Tokens = Annotated[int, Within(1, LARGEST_INT)]
Factor = Annotated[float, Within(float_info.min, 1e6, "positive and finite", "1.0")]
Strength = Annotated[float, Within(0.0, 1e6, "finite and not negative", "0.0")]
Share = Annotated[float, Within(0.0, nextafter(1.0, 0.0), "in [0, 1)")]
Threshold = Annotated[float, Within(float_info.min, 1.0, "in (0, 1]")]


@dataclass(frozen=True, kw_only=True)
class RoutingConfig(Typed):
    """How tokens choose experts; every field is an axis of its own, and a flag `--ep-FIELD`.

    The defaults are Megatron's: softmax, top-2 with weights that sum to 1, nothing dropped.
    Raises ConfigError for a value that is none of its type's, and when the settings contradict each
    other.
    """

    topk: Chosen = 2
    # scores and weights
    score_function: ScoreFunction = "softmax"
    normalize: Normalize = "before_drop"  # divide a token's weights by their sum: when, or not
    scaling_factor: Factor = 1.0  # of the weights (DeepSeek-V3, arXiv:2412.19437, has 2.5)
    router_dtype: RouterDtype = "fp32"  # of the logits; all that follows is fp32 at least
    router_bias: bool = False
    # exploration
    jitter_eps: Share = 0.0  # input times U[1-eps, 1+eps], training (arXiv:2101.03961, app. C)
    noise: Noise = "none"  # rsample: Gumbel noise on the logits picks, in training (DeepSpeed-MoE)
    second_expert: SecondExpert = "all"  # sampling: drawn; random, threshold: may be left out
    second_threshold: Threshold = (
        0.2  # random keeps with g2/threshold, threshold when g2 exceeds it
    )
    # limits on the choice
    num_groups: Groups | None = (
        None  # groups of experts; a token chooses inside `group_topk` of them
    )
    group_topk: Groups | None = None
    group_score_topk: Chosen | None = (
        None  # of its experts' scores in its own; None: topk / group_topk
    )
    expert_bias: bool = False  # added to the scores for the choice alone (arXiv:2408.15664)
    bias_update_rate: Strength = 1e-3
    quantile_balancing: bool = False  # a bias of the choice alone: the logits' quantile at balance
    quantile_ema: Share = 0.0  # weight of that bias so far in the next one
    # random logits, with the gradient of the true ones: all experts alike, to measure speed
    force_load_balancing: bool = False
    # capacity: tokens an expert takes from one routing group
    capacity_factor: Factor | None = None  # in training; None: nothing is dropped
    eval_capacity_factor: Factor | None = None  # in evaluation; None: nothing is dropped
    min_capacity: Annotated[int, Within(0, LARGEST_INT)] = 0
    capacity_rounding: CapacityRounding = "ceil"
    capacity_counts_topk: bool = True  # capacity = factor * S * K / E, else factor * S / E
    drop_policy: DropPolicy = "none"  # who goes when an expert is full
    group_tokens: Tokens | None = None  # tokens of a routing group; None: all of the rank's
    # losses
    aux_loss_coeff: Strength = 0.0  # Switch Transformer, eq. 4; 1 when balanced, before this factor
    aux_loss_counts: AuxLossCounts = "topk"  # which choices count
    aux_loss_scope: AuxLossScope = "micro_batch"  # over which tokens
    further_losses: tuple[tuple[AuxLossScope, float], ...] = ()  # beside it: scope, coefficient
    aux_loss_layers: AuxLossLayers = "sum"  # mean: divided by the number of MoE layers
    z_loss_coeff: Strength = 0.0  # ST-MoE, arXiv:2202.08906, eq. 5
    # expert choice looks at later tokens: wrong for a causal model
    force_expert_choice: bool = False

    def __post_init__(self) -> None:
        self._check_capacity()
        if self.topk == 1 and self.normalize != "none" and not self._has_losses:
            raise ConfigError(
                f"<topk> (1) with <normalize> ({self.normalize}) leaves the router no gradient: "
                "one weight divided by itself is 1; use <normalize=none>"
            )
        if self.second_expert != "all" and self.topk != 2:
            raise ConfigError(
                f"<second_expert> ({self.second_expert}) needs <topk=2>; got {self.topk}; use "
                "<second_expert=all>"
            )
        if self.noise != "none" and (self.expert_bias or self.num_groups is not None):
            raise ConfigError(
                f"<noise> ({self.noise}) ranks by logits, <expert_bias> ({self.expert_bias}) and "
                f"<num_groups> ({self.num_groups}) by scores; use <noise=none>"
            )
        self._check_groups()
        self._check_balancing()

    def _check_balancing(self) -> None:
        scopes = [self.aux_loss_scope, *dict(self.further_losses)]
        legal = set(_FURTHER) - ({"micro_batch"} if self.aux_loss_scope == "group" else set())
        fine = all(coefficient > 0 for _, coefficient in self.further_losses)
        if len({*scopes}) <= len(self.further_losses) or {*scopes[1:]} - legal or not fine:
            said = ",".join(f"{scope}:{coefficient}" for scope, coefficient in self.further_losses)
            other = "global" if self.aux_loss_scope == "sequence" else "sequence"
            raise ConfigError(
                f"<further_losses> ({said}) must have other scopes than <aux_loss_scope> "
                f"({self.aux_loss_scope}), of {', '.join(_FURTHER)}, each once with a positive "
                f"coefficient; use <further_losses={other}:0.001>"
            )
        for name in ("aux_loss_coeff", "expert_bias", "num_groups", "noise", "second_expert"):
            value, off = getattr(self, name), getattr(type(self), name)
            if self.quantile_balancing and value != off:
                raise ConfigError(
                    f"<{name}> and <quantile_balancing> do not go together: a quantile "
                    f"of the logits chooses and balances alone; use <{name}={off}>"
                )

    def _check_groups(self) -> None:
        if self.num_groups is not None and self.group_topk is None:
            fewer = largest_divisor(self.topk, min(self.num_groups, self.topk) - 1)
            raise ConfigError(
                f"<num_groups> ({self.num_groups}) needs <group_topk>, the groups a token may "
                f"choose in; use <group_topk={fewer}> or <num_groups=None>"
            )
        if self.group_topk is not None and self.num_groups is None:
            raise ConfigError(
                f"<group_topk> ({self.group_topk}) needs <num_groups>, the groups there are; use "
                f"<num_groups={2 * self.group_topk}> or <group_topk=None>"
            )
        if self.group_score_topk is not None and self.num_groups is None:
            raise ConfigError(
                f"<group_score_topk> ({self.group_score_topk}) needs <num_groups> and "
                "<group_topk>; use <num_groups=2> with <group_topk=1>, or <group_score_topk=None>"
            )

    def _check_capacity(self) -> None:
        given = {
            name: getattr(self, name)
            for name in ("capacity_factor", "eval_capacity_factor")
            if getattr(self, name) is not None
        }
        if given and self.drop_policy == "none" and not self.force_expert_choice:
            name, value = next(iter(given.items()))
            raise ConfigError(
                f"<{name}> ({value}) needs a drop policy, and <drop_policy> is none (dropless); "
                "use <drop_policy=probs>"
            )
        if self.drop_policy != "none" and not given:
            raise ConfigError(
                f"<drop_policy> ({self.drop_policy}) needs <capacity_factor> or "
                "<eval_capacity_factor>, and both are None (dropless); use <capacity_factor=1.25>"
            )
        if self.aux_loss_scope == "group" and self.group_tokens is None:
            raise ConfigError(
                "<aux_loss_scope> (group) needs <group_tokens>, the tokens of a routing group; use "
                "<group_tokens=1024> or <aux_loss_scope=micro_batch>"
            )

    @property
    def balancing_losses(self) -> tuple[tuple[AuxLossScope, float], ...]:
        """The load-balancing losses: scope and coefficient of each."""
        if self.aux_loss_coeff == 0:
            return ()
        return ((self.aux_loss_scope, self.aux_loss_coeff), *self.further_losses)

    @property
    def _has_losses(self) -> bool:
        return self.aux_loss_coeff > 0 or self.z_loss_coeff > 0

    def check_experts(self, num_experts: int) -> None:
        """Raise ConfigError when a layer of `num_experts` cannot be routed this way."""
        if self.topk > num_experts:
            legal = f"<topk={num_experts}>" + (" with <normalize=none>" if num_experts == 1 else "")
            raise ConfigError(
                f"<topk> ({self.topk}) must be at most <num_experts> ({num_experts}); use {legal}"
            )
        if self.quantile_balancing and self.topk == num_experts:
            raise ConfigError(
                f"<topk> ({self.topk}) must be below <num_experts> ({num_experts}) with "
                f"<quantile_balancing>; use <num_experts={num_experts + 1}>"
            )
        if self.num_groups is None or self.group_topk is None:
            return
        if num_experts % self.num_groups:
            raise ConfigError(
                f"<num_groups> ({self.num_groups}) must divide <num_experts> ({num_experts}); use "
                f"{_UNGROUPED}"
            )
        if self.group_topk > self.num_groups:
            raise ConfigError(
                f"<group_topk> ({self.group_topk}) must be at most <num_groups> "
                f"({self.num_groups}); use {_UNGROUPED}"
            )
        per_group = num_experts // self.num_groups
        if self.topk > per_group * self.group_topk:
            least = -(-self.topk // per_group)
            fitting = next((g for g in range(least, self.num_groups + 1) if self.topk % g == 0), 0)
            raise ConfigError(
                f"<topk> ({self.topk}) must be at most {per_group * self.group_topk}, what "
                f"<group_topk> ({self.group_topk}) groups of {per_group} experts have; use "
                + (f"<group_topk={fitting}> or {_UNGROUPED}" if fitting else _UNGROUPED)
            )
        if self.group_score_topk is None and self.topk % self.group_topk:
            raise ConfigError(
                f"<topk> ({self.topk}) is no multiple of <group_topk> ({self.group_topk}), so how "
                "many experts give a group its score is to be said; use "
                f"<group_score_topk={max(1, self.topk // self.group_topk)}>"
            )
        if self.each_of_group > per_group:
            raise ConfigError(
                f"<group_score_topk> ({self.group_score_topk}) must be at most the experts of a "
                f"group ({per_group}); use <group_score_topk={per_group}>"
            )

    @property
    def each_of_group(self) -> int:
        """How many of a group's experts add up to its score."""
        return self.group_score_topk or self.topk // (self.group_topk or 1)


_FURTHER = ("micro_batch", "sequence", "global")
