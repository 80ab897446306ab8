"""What a user can set of one block, validated once. Nothing here imports torch."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from ep_plugin.errors import ConfigError
from ep_plugin.moe.routing_config import MOST_EXPERTS, Factor, RoutingConfig, Tokens
from ep_plugin.moe.rules import check_needs
from ep_plugin.typed import Named, Typed, Within

Activation = Literal["swiglu", "geglu", "geglu_tanh", "gelu", "relu"]
# with a gate half, so that fc1 has twice as many outputs as fc2 has inputs
GATED: tuple[Activation, ...] = ("swiglu", "geglu", "geglu_tanh")
SharedExpert = Literal["sum", "learned"]
Fp8 = Literal["off", "rowwise", "blockwise"]
Fp8Wgrad = Literal["fp8", "bf16"]
Save = Literal["bf16", "fp8", "recompute"]
CheckSplits = Literal["first", "always", "off"]
DispatchDtype = Literal["bf16", "fp8"]
# Most ranks of ep and etp in a CUDA graph: dispatcher symm_mem has room for all their tokens then.
GRAPH_RANKS = 8

Size = Annotated[int, Within(1, 1 << 24, use="1024")]
Experts = Annotated[int, Within(1, MOST_EXPERTS, use="8")]
Few = Annotated[int, Within(1, 1 << 16)]
Option = Annotated[str, Named()]


@dataclass(frozen=True, kw_only=True)
class MoEConfig(Typed):
    """One Mixture-of-Experts block.

    Raises ConfigError for a value that is none of its type's, and when the settings contradict each
    other.
    """

    hidden_size: Size
    ffn_hidden_size: Size  # of one expert
    num_experts: Experts
    activation: Activation = "swiglu"
    bias: bool = False  # in the experts
    routing: RoutingConfig = field(default_factory=RoutingConfig)
    # a module given as the layer's shared expert: added, or weighed against the routed experts by
    # a learned softmax of two (DeepSpeed-MoE's residual expert)
    shared_expert: SharedExpert = "sum"
    num_moe_layers: Few = 1  # of the model, for aux_loss_layers = mean
    fp8: Fp8 = "off"  # recipe of the experts' products
    fp8_wgrad: Fp8Wgrad = "fp8"  # of their weight gradients, where fp8 is not off
    save: Save = "bf16"  # how the experts' pre-activations are kept for the backward
    # How many rows are computed at a time, times those that a rank gets when all have as many
    # tokens and all experts are chosen alike; pre-activations are kept of the first so many.
    # None: all rows, at once.
    rank_capacity: Factor | None = None
    deterministic: bool = False  # equal bits in every run: no kernel is chosen by measuring
    router: Option = "topk"
    dispatcher: Option = "auto"
    # a token travels once to a rank, not once for each expert there; None: as dispatcher = auto
    # finds best, and off beside a dispatcher by name
    dispatch_dedup: bool | None = None
    dispatch_dtype: DispatchDtype = "bf16"  # fp8: tokens travel as the experts' products read them
    check_splits: CheckSplits = "first"  # whether ranks compare what they send; first: 8 dispatches
    comm_sms: Few = 32  # SMs of the GPU that dispatcher symm_mem copies with
    gemm: Option = "auto"
    overlap: Option = "auto"  # the order of a layer's verbs: what is computed while tokens travel
    overlap_chunks: Few | None = None  # of the other ranks, for overlap = chunked; None: 2 at most
    # What is known of the run, for `auto` (moe/auto.py) and for refusals: whether its steps are in
    # a CUDA graph, and the tokens of a micro-batch on one rank.
    in_graph: bool = False
    tokens: Tokens | None = None

    def __post_init__(self) -> None:
        if self.fp8 != "off" and self.bias:
            raise ConfigError(
                f"<fp8> ({self.fp8}) needs experts without bias; use <bias=False> or <fp8=off>"
            )
        self.routing.check_experts(self.num_experts)
        if self.router == "expert_choice" and not self.routing.force_expert_choice:
            raise ConfigError(
                "<router> (expert_choice) lets later tokens decide where earlier ones go, so a "
                "causal model would see its future; use <router=topk>, or "
                "<force_expert_choice=True> with <capacity_factor=2.0> for one that is not causal"
            )
        check_needs(self)

    @property
    def gated(self) -> bool:
        """Whether the activation has a gate half, so that fc1 has 2 * ffn_hidden_size outputs."""
        return self.activation in GATED
