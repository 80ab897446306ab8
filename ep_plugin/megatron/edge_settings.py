"""What a user of the Megatron edge sets. Imports neither torch nor Megatron."""

from dataclasses import dataclass, field
from typing import Any

from ep_plugin.moe.config import (
    Activation,
    CheckSplits,
    DispatchDtype,
    Fp8,
    Fp8Wgrad,
    Save,
    SharedExpert,
)


@dataclass(frozen=True)
class EdgeSettings:
    """What the `--ep-*` flags say; None where a flag was not given."""

    router: str = "topk"
    dispatcher: str = "auto"
    gemm: str = "auto"
    overlap: str = "auto"
    routing: dict[str, Any] = field(default_factory=dict)  # fields of RoutingConfig
    dense_activation: Activation | None = None
    expert_activation: Activation | None = None
    experts_per_layer: tuple[int, ...] | None = None
    shared_expert: SharedExpert | None = None
    fp8: Fp8 | None = None
    fp8_wgrad: Fp8Wgrad | None = None
    save: Save | None = None
    deterministic: bool | None = None
    dispatch_dtype: DispatchDtype | None = None
    dispatch_dedup: bool | None = None
    check_splits: CheckSplits | None = None
    comm_sms: int | None = None
    ranks_per_node: int | None = None
    overlap_chunks: int | None = None
    metrics: bool = False  # whether somebody reads the routers' metrics
    tokens: int | None = None  # of a micro-batch on one rank, where the arguments say
