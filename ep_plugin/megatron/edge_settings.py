"""What a user of the Megatron edge sets. Imports neither torch nor Megatron."""

from dataclasses import dataclass, field
from typing import Any

from ep_plugin.moe.config import (
    Activation,
    CheckSplits,
    DispatchDtype,
    Experts,
    Few,
    Fp8,
    Fp8Wgrad,
    Option,
    Save,
    SharedExpert,
)
from ep_plugin.moe.parallel import RanksOfNode
from ep_plugin.moe.routing_config import Factor, RoutingConfig, Tokens
from ep_plugin.typed import Typed, check_value


@dataclass(frozen=True)
class EdgeSettings(Typed):
    """What the `--ep-*` flags say; None where a flag was not given.

    Raises ConfigError for a value that is none of its type's.
    """

    router: Option = "topk"
    dispatcher: Option = "auto"
    gemm: Option = "auto"
    overlap: Option = "auto"
    routing: dict[str, Any] = field(default_factory=dict)  # fields of RoutingConfig
    dense_activation: Activation | None = None
    expert_activation: Activation | None = None
    experts_per_layer: tuple[Experts, ...] | None = None
    shared_expert: SharedExpert | None = None
    fp8: Fp8 | None = None
    fp8_wgrad: Fp8Wgrad | None = None
    save: Save | None = None
    rank_capacity: Factor | None = None
    deterministic: bool | None = None
    dispatch_dtype: DispatchDtype | None = None
    dispatch_dedup: bool | None = None
    check_splits: CheckSplits | None = None
    comm_sms: Few | None = None
    ranks_per_node: RanksOfNode | None = None
    overlap_chunks: Few | None = None
    metrics: bool = False  # whether somebody reads the routers' metrics
    tokens: Tokens | None = None  # of a micro-batch on one rank, where the arguments say

    def __post_init__(self) -> None:
        for name, value in self.routing.items():
            check_value(RoutingConfig, name, value)
