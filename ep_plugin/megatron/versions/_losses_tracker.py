"""Auxiliary losses from 0.18 on: an object that records and reports."""

from typing import Any

from torch import Tensor

from ep_plugin.megatron.seams.touchpoints import Touchpoint

_LOGGING = "megatron.core.transformer.moe.moe_logging"
WRITERS = (f"{_LOGGING}:MoEMetricsTracker.report",)

TOUCHPOINTS = (
    Touchpoint(f"{_LOGGING}:get_moe_metrics_tracker"),
    Touchpoint(
        f"{_LOGGING}:MoEMetricsTracker.record",
        ("name", "value", "layer_number", "num_layers", "reduce_group", "avg_group"),
    ),
    *(Touchpoint(path, ("iteration", "writer", "wandb_writer", "num_layers")) for path in WRITERS),
)


def record(name: str, loss: Tensor, layer_number: int, num_layers: int, **groups: Any) -> None:
    """Add `loss` [] of a layer, counted from 1, to what Megatron writes for `name`."""
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

    get_moe_metrics_tracker().record(name, loss, layer_number, num_layers, **groups)
