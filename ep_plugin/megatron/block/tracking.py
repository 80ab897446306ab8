"""Losses, loads and decisions of the routers, written when and where Megatron writes its own."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ep_plugin.moe.interfaces import Routing

# Sums over tokens that routers report, and the name of each divided by the number of tokens.
MEANS = {
    "confidence": "router_confidence",
    "entropy": "router_entropy",
    "first": "dispatched_first",
    "second": "dispatched_second",
    "none": "dispatched_none",
}
SUMS = ("tokens", "choices", "dropped", *MEANS)


class RoutingTracker:
    """Collects what routers report between two logs.

    Losses go, with `record_loss`, to where Megatron collects its own. The rest is summed here and
    written under `ep/`, for each layer L, counted from 1 as Megatron does, over all ranks since the
    last log:

        tokens_per_expert/layer_L/expert_E  the expert's share (0..1) of its layer's rows
        max_over_mean/layer_L               the fullest expert's rows over the average's
        dropped_fraction/layer_L            choices that no expert had room for (0..1)
        router_confidence/layer_L           mean score of the first choice
        router_entropy/layer_L              mean entropy of the scores, in nats
        dispatched_{first,second,none}/layer_L  tokens (0..1) whose first, second or no choice
                                            was sent
    """

    def __init__(self, record_loss: Callable[..., None]) -> None:
        self._record_loss = record_loss
        self._rows: dict[int, Tensor] = {}  # layer number -> [E] int64
        self._sums: dict[int, Tensor] = {}  # layer number -> [len(SUMS)] float64

    def record(self, layer: Any, routing: Routing) -> None:
        """Take one micro-batch's routing in `layer`, an EPMoELayer. Nothing is communicated."""
        for name, loss in routing.losses.items():
            groups = (
                {"avg_group": layer.tp_dp_cp_group}
                if name == "z_loss"
                else {"reduce_group": layer.tp_cp_group}
            )
            self._record_loss(name, loss, layer.layer_number, layer.config.num_layers, **groups)
        _accumulate(self._rows, layer.layer_number, routing.tokens_per_expert)
        if routing.metrics:
            sums = torch.stack([routing.metrics[name].double() for name in SUMS])
            _accumulate(self._sums, layer.layer_number, sums)

    def write(self, iteration: int, num_layers: int, writer: Any, wandb_writer: Any) -> None:
        """Sum over all ranks, write, start anew. Every rank must call it together."""
        rows, sums = self._gather(num_layers)
        scalars = _loads(rows) | _decisions(sums)
        if writer is not None:
            for name, value in scalars.items():
                writer.add_scalar(name, value, iteration)
        if wandb_writer is not None:
            wandb_writer.log(scalars, iteration)

    def _gather(self, num_layers: int) -> tuple[Tensor, Tensor]:
        """Return rows [layers, E] and sums [layers, len(SUMS)] of all ranks; ours begin anew.

        A layer with fewer experts than another has -1 where it has none.
        """
        device = torch.cuda.current_device()
        width = max((len(rows) for rows in self._rows.values()), default=0)
        size = torch.tensor(width, device=device)
        dist.all_reduce(size, op=dist.ReduceOp.MAX)  # stages without MoE layers do not know
        rows = torch.zeros(num_layers, int(size), dtype=torch.int64, device=device)
        experts = torch.zeros(num_layers, dtype=torch.int64, device=device)
        sums = torch.zeros(num_layers, len(SUMS), dtype=torch.float64, device=device)
        for number, counts in self._rows.items():
            rows[number - 1, : len(counts)] = counts
            experts[number - 1] = len(counts)
            counts.zero_()
        for number, values in self._sums.items():
            sums[number - 1] = values
            values.zero_()
        dist.all_reduce(rows)
        dist.all_reduce(experts, op=dist.ReduceOp.MAX)
        dist.all_reduce(sums)
        absent = torch.arange(rows.shape[1], device=device) >= experts.unsqueeze(1)
        return rows.masked_fill(absent, -1), sums


def _accumulate(store: dict[int, Tensor], number: int, values: Tensor) -> None:
    """Add in place, into memory that stays: replays of a CUDA graph add there too."""
    if number in store:
        store[number] += values
    else:
        store[number] = values.clone()


def _loads(rows: Tensor) -> dict[str, float]:
    """Return each expert's share of its layer and the layer's imbalance, where there were rows."""
    scalars = {}
    for layer, row in enumerate(rows.tolist(), start=1):
        counts = [count for count in row if count >= 0]
        total = sum(counts)
        if not total:
            continue
        scalars[f"ep/max_over_mean/layer_{layer}"] = max(counts) * len(counts) / total
        for expert, count in enumerate(counts):
            scalars[f"ep/tokens_per_expert/layer_{layer}/expert_{expert}"] = count / total
    return scalars


def _decisions(sums: Tensor) -> dict[str, float]:
    """Return the means of each layer that had tokens; `sums` [layers, len(SUMS)]."""
    scalars = {}
    for layer, values in enumerate(sums.tolist(), start=1):
        named = dict(zip(SUMS, values, strict=True))
        if not named["tokens"]:
            continue
        scalars[f"ep/dropped_fraction/layer_{layer}"] = named["dropped"] / max(named["choices"], 1)
        for name, title in MEANS.items():
            scalars[f"ep/{title}/layer_{layer}"] = named[name] / named["tokens"]
    return scalars
