"""Losses, loads and decisions of the routers, written when and where Megatron writes its own."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ep_plugin.megatron.block.models import Key, Models, row_of, uses
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
# Losses that are also kept for each model; a router of the user's own may have others.
LOSSES = (
    "load_balancing_loss",
    "seq_load_balancing_loss",
    "global_load_balancing_loss",
    "z_loss",
)


class RoutingTracker:
    """Collects what routers report between two logs, each model's apart.

    Losses go, with `record_loss`, to where Megatron collects its own. The rest is summed here and
    written under `ep/`, over all ranks since the last log, for each layer L, counted from 1 as
    Megatron does (the layers of multi-token prediction behind the decoder's):

        tokens_per_expert/layer_L/expert_E  the expert's share (0..1) of its layer's rows
        max_over_mean/layer_L               the fullest expert's rows over the average's
        dropped_fraction/layer_L            choices that no expert had room for (0..1)
        router_confidence/layer_L           mean score of the first choice
        router_entropy/layer_L              mean entropy of the scores, in nats
        dispatched_{first,second,none}/layer_L  tokens (0..1) whose first, second or no choice
                                            was sent

    Where several models train in one process, such as a policy and a reward model, the second's are
    under `ep/model_2/`, and so on. Megatron adds up what all of them record of a loss until it is
    next written, so each model's are written here too, the mean over its micro-batches:

        {LOSS}/layer_L                      those of `LOSSES`
    """

    def __init__(self, record_loss: Callable[..., None]) -> None:
        self._record_loss = record_loss
        self._models = Models()
        self._totals: dict[Key, _Totals] = {}  # of models that have recorded, in that order

    def enter(self, layer: Any) -> None:
        """Note whose layer this is; in the order in which models are built."""
        self._models.key_of(layer)

    def record(self, layer: Any, routing: Routing) -> None:
        """Take one micro-batch's routing in `layer`, an EPMoELayer. Nothing is communicated."""
        key, row = self._models.key_of(layer), row_of(layer)
        totals = self._totals.setdefault(key, _Totals())
        for name, loss in routing.losses.items():
            once = loss / uses(layer)
            self._record_with_megatron(layer, name, once)
            if self._models.several and name in LOSSES:
                # Parts of one loss lie on the ranks of tp_cp; a z-loss is each rank's own mean.
                parts = 1 if name == "z_loss" else layer.tp_cp_group.size()
                pair = torch.stack([loss.double() * parts, torch.ones_like(loss).double()])
                _accumulate(totals.losses.setdefault(name, {}), row, pair)
        _accumulate(totals.rows, row, routing.tokens_per_expert)
        if routing.metrics:
            sums = torch.stack([routing.metrics[name].double() for name in SUMS])
            _accumulate(totals.sums, row, sums)

    def _record_with_megatron(self, layer: Any, name: str, loss: Tensor) -> None:
        groups = (
            {"avg_group": layer.tp_dp_cp_group}
            if name == "z_loss"
            else {"reduce_group": layer.tp_cp_group}
        )
        config = layer.config
        layers = config.num_layers + (getattr(config, "mtp_num_layers", None) or 0)
        self._record_loss(name, loss, row_of(layer), layers, **groups)

    def write(self, iteration: int, writer: Any, wandb_writer: Any) -> None:
        """Sum over all ranks, write, start anew. Every rank must call it together."""
        keys, shape = self._agree()
        scalars: dict[str, float] = {}
        for number, key in enumerate(keys, start=1):
            found = self._totals.get(key, _Totals()).gather(*shape, with_losses=len(keys) > 1)
            prefix = "ep" if number == 1 else f"ep/model_{number}"
            scalars |= {f"{prefix}/{name}": value for name, value in found.items()}
        if writer is not None:
            for name, value in scalars.items():
                writer.add_scalar(name, value, iteration)
        if wandb_writer is not None:
            wandb_writer.log(scalars, iteration)

    def sums(self) -> list[Tensor]:
        """Return what was summed since the last log: memory that stays, to be changed in place."""
        found: list[Tensor] = []
        for totals in self._totals.values():
            for by_row in (totals.rows, totals.sums, *totals.losses.values()):
                found.extend(by_row.values())
        return found

    def _agree(self) -> tuple[list[Key], tuple[int, int]]:
        """Return the models that any rank has, in one order, and the most layers and experts.

        Stages without MoE layers of a model do not know it.
        """
        own = list(self._totals)
        rows = [pair for totals in self._totals.values() for pair in totals.rows.items()]
        most_rows = max((row for row, _ in rows), default=0)
        most_experts = max((len(counts) for _, counts in rows), default=0)
        digest = zlib.crc32(repr(own).encode())
        highest, lowest = (digest, digest) if own else (-1, 2**40)
        mine = [most_rows, most_experts, len(own), highest, -lowest]
        most = torch.tensor(mine, dtype=torch.int64, device=torch.cuda.current_device())
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        num_rows, width, models, highest, lowest = most.tolist()
        if models == 0:
            return [], (0, 0)
        if models == 1 and highest == -lowest:  # ranks that do not know it need no name for it
            return own or [((), 0)], (num_rows, width)
        everyone: list[list[Key]] = [[]] * dist.get_world_size()
        dist.all_gather_object(everyone, own)
        place: dict[Key, int] = {}
        for keys in everyone:
            for number, key in enumerate(keys):
                place[key] = max(place.get(key, 0), number)
        return sorted(place, key=lambda key: (place[key], key)), (num_rows, width)


@dataclass
class _Totals:
    """What one model's routers reported since the last log; keys are rows of layers, from 1."""

    rows: dict[int, Tensor] = field(default_factory=dict)  # row -> [E] int64
    sums: dict[int, Tensor] = field(default_factory=dict)  # row -> [len(SUMS)] float64
    losses: dict[str, dict[int, Tensor]] = field(default_factory=dict)  # row -> [2]: sum, number

    def gather(self, num_rows: int, width: int, with_losses: bool) -> dict[str, float]:
        """Return all scalars over all ranks, of layers up to `num_rows`; ours begin anew.

        No layer has more than `width` experts.
        """
        device = torch.cuda.current_device()
        counts = torch.zeros(num_rows, width, dtype=torch.int64, device=device)
        experts = torch.zeros(num_rows, dtype=torch.int64, device=device)
        sums = torch.zeros(num_rows, len(SUMS), dtype=torch.float64, device=device)
        losses = torch.zeros(num_rows, len(LOSSES), 2, dtype=torch.float64, device=device)
        for row, values in self.rows.items():
            counts[row - 1, : len(values)] = values
            experts[row - 1] = len(values)
            values.zero_()
        for row, values in self.sums.items():
            sums[row - 1] = values
            values.zero_()
        for name, by_row in self.losses.items():
            for row, values in by_row.items():
                losses[row - 1, LOSSES.index(name)] = values
                values.zero_()
        for tensor in (counts, sums, losses):
            dist.all_reduce(tensor)
        dist.all_reduce(experts, op=dist.ReduceOp.MAX)
        # A layer with fewer experts than another has -1 where it has none.
        absent = torch.arange(width, device=device) >= experts.unsqueeze(1)
        found = _loads(counts.masked_fill(absent, -1)) | _decisions(sums)
        return found | _means(losses) if with_losses else found


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
        scalars[f"max_over_mean/layer_{layer}"] = max(counts) * len(counts) / total
        for expert, count in enumerate(counts):
            scalars[f"tokens_per_expert/layer_{layer}/expert_{expert}"] = count / total
    return scalars


def _decisions(sums: Tensor) -> dict[str, float]:
    """Return the means of each layer that had tokens; `sums` [layers, len(SUMS)]."""
    scalars = {}
    for layer, values in enumerate(sums.tolist(), start=1):
        named = dict(zip(SUMS, values, strict=True))
        if not named["tokens"]:
            continue
        scalars[f"dropped_fraction/layer_{layer}"] = named["dropped"] / max(named["choices"], 1)
        for name, title in MEANS.items():
            scalars[f"{title}/layer_{layer}"] = named[name] / named["tokens"]
    return scalars


def _means(losses: Tensor) -> dict[str, float]:
    """Return the mean of each loss of each layer that had one; `losses` [layers, LOSSES, 2]."""
    scalars = {}
    for layer, by_name in enumerate(losses.tolist(), start=1):
        for name, (total, number) in zip(LOSSES, by_name, strict=True):
            if number:
                scalars[f"{name}/layer_{layer}"] = total / number
    return scalars
