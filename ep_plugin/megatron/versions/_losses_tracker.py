"""Auxiliary losses from 0.18 on: an object that records and reports."""

from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from ep_plugin.megatron.seams.touchpoints import Touchpoint

_LOGGING = "megatron.core.transformer.moe.moe_logging"
WRITERS = (f"{_LOGGING}:MoEMetricsTracker.report",)

TOUCHPOINTS = (
    Touchpoint(f"{_LOGGING}:get_moe_metrics_tracker"),
    Touchpoint(
        f"{_LOGGING}:MoEMetricsTracker.record",
        ("name", "value", "layer_number", "num_layers", "reduce_group", "avg_group"),
    ),
    Touchpoint(f"{_LOGGING}:MoEMetricsTracker.metrics"),
    Touchpoint(f"{_LOGGING}:MetricEntry", ("values",)),
    *(Touchpoint(path, ("iteration", "writer", "wandb_writer", "num_layers")) for path in WRITERS),
)


def record(name: str, loss: Tensor, layer_number: int, num_layers: int, **groups: Any) -> None:
    """Add `loss` [] of a layer, counted from 1, to what Megatron writes for `name`."""
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

    tracker = get_moe_metrics_tracker()
    entry = tracker.metrics.get(name)
    if entry is not None and len(entry.values) < num_layers:  # of a model with fewer layers
        entry.values = pad(entry.values, (0, num_layers - len(entry.values)))
    tracker.record(name, loss, layer_number, num_layers, **groups)
