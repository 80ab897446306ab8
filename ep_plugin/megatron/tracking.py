"""Losses and loads of the routers, written when and where Megatron writes its own."""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from torch import Tensor

from ep_plugin.contracts import Routing


class RoutingTracker:
    """Collects what routers report between two logs.

    Losses go to Megatron's metrics tracker. Rows per expert are summed here and written as
    `ep/tokens_per_expert/layer_L/expert_E`, the expert's share (0..1) of its layer's rows since
    the last log; L counts from 1 as Megatron does, E from 0.
    """

    def __init__(self) -> None:
        self._rows: dict[int, Tensor] = {}  # layer number -> [E] int64

    def record(self, layer: Any, routing: Routing) -> None:
        """Take one micro-batch's routing in `layer`, an EPMoELayer. Nothing is communicated."""
        config = layer.config
        for name, loss in routing.losses.items():
            groups = (
                {"reduce_group": layer.tp_cp_group}
                if name == "load_balancing_loss"
                else {"avg_group": layer.tp_dp_cp_group}
            )
            get_moe_metrics_tracker().record(
                name, loss, layer.layer_number, config.num_layers, **groups
            )
        rows = routing.tokens_per_expert
        number = layer.layer_number
        self._rows[number] = self._rows[number] + rows if number in self._rows else rows.clone()

    def write(self, iteration: int, num_layers: int, writer: Any, wandb_writer: Any) -> None:
        """Sum over all ranks, write the shares, start anew. Every rank must call it together."""
        device = torch.cuda.current_device()
        num_experts = torch.zeros((), dtype=torch.int64, device=device)
        if self._rows:
            num_experts.fill_(len(next(iter(self._rows.values()))))
        dist.all_reduce(num_experts, op=dist.ReduceOp.MAX)  # stages without MoE layers do not know
        rows = torch.zeros(num_layers, int(num_experts), dtype=torch.int64, device=device)
        for number, counts in self._rows.items():
            rows[number - 1] = counts
        self._rows = {}
        dist.all_reduce(rows)
        scalars = _shares(rows)
        if writer is not None:
            for name, share in scalars.items():
                writer.add_scalar(name, share, iteration)
        if wandb_writer is not None:
            wandb_writer.log(scalars, iteration)


def _shares(rows: Tensor) -> dict[str, float]:
    """Return each expert's share of its layer, for layers that had rows; `rows` [layers, E]."""
    return {
        f"ep/tokens_per_expert/layer_{layer}/expert_{expert}": count / sum(counts)
        for layer, counts in enumerate(rows.tolist(), start=1)
        if sum(counts)
        for expert, count in enumerate(counts)
    }
