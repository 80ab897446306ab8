"""Auxiliary losses in 0.16 and 0.17: a dictionary by name, written by a function."""

from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from ep_plugin.megatron.seams.touchpoints import Touchpoint

_FUNCTION = "track_moe_metrics"
# Megatron's loop has bound the function's name in its own module and looks it up there.
WRITERS = (
    f"megatron.core.transformer.moe.moe_utils:{_FUNCTION}",
    f"megatron.training.training:{_FUNCTION}",
)
_PARAMETERS = ("iteration", "writer", "wandb_writer", "num_layers")

TOUCHPOINTS = (
    *(Touchpoint(path, _PARAMETERS) for path in WRITERS),
    Touchpoint(
        "megatron.core.transformer.moe.moe_utils:save_to_aux_losses_tracker",
        ("name", "loss", "layer_number", "num_layers", "reduce_group", "avg_group"),
    ),
    Touchpoint("megatron.core.transformer.moe.moe_utils:get_moe_layer_wise_logging_tracker"),
)


def record(name: str, loss: Tensor, layer_number: int, num_layers: int, **groups: Any) -> None:
    """Add `loss` [] of a layer, counted from 1, to what Megatron writes for `name`."""
    from megatron.core.transformer.moe.moe_utils import (
        get_moe_layer_wise_logging_tracker,
        save_to_aux_losses_tracker,
    )

    entry = get_moe_layer_wise_logging_tracker().get(name)
    if entry is not None and len(entry["values"]) < num_layers:  # of a model with fewer layers
        entry["values"] = pad(entry["values"], (0, num_layers - len(entry["values"])))
    save_to_aux_losses_tracker(name, loss, layer_number, num_layers, **groups)
