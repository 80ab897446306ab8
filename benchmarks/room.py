"""The room of a layer against skew, with and without --ep-rank-capacity, counted on CPU ranks.

python benchmarks/room.py            counts, draws docs/pictures/room.png and keeps the figures
python benchmarks/room.py --draw     draws it from the figures that are kept

The layer of Qwen3-30B-A3B on 8 expert-parallel ranks, with a sixteenth of its tokens, hidden size
and FFN size: a tensor of rows, or of weights, is then 256 times smaller, and bytes are shown times
256. Indices are 16 times smaller, and count for little. What is counted is the tensors that one
forward and backward make (see counted.py), on the rank that most tokens go to. In a graph means
with the shapes that a captured step has: nothing is captured on a CPU. Not counted are the buffers
of the exchange, weights, and totals of gradients, which none of this changes.
"""

import argparse
import json
import multiprocessing
import os
import socket
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from counted import counted
from torch import Tensor, nn

from ep_plugin import MoEConfig, MoELayer, ParallelConfig, create_expert_groups
from ep_plugin.commands.bench.figures import versions
from ep_plugin.commands.bench.shapes import SHAPES
from ep_plugin.moe.dispatcher import symm_mem
from ep_plugin.moe.interfaces import Routing
from ep_plugin.written import write_picture, write_whole

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "room_cpu.json"
PICTURE = HERE.parent / "docs" / "pictures" / "room.png"
SHAPE, RANKS, SMALLER = SHAPES["q3-30b-ep8"], 8, 16
CAPACITY = 1.25
SHARES = (1 / 8, 1 / 4, 1 / 2, 1.0)  # of all tokens, that go to one rank; the first is balance
WAYS = {  # name -> schedule, and whether shapes are those of a graph
    "launched by the host": ("serial", False),
    "in a graph": ("serial", True),
    "in a graph, chunked": ("chunked", True),
}


class Scripted(nn.Module):
    """Sends a share of the tokens to the experts of rank 0, and the others evenly elsewhere."""

    def __init__(self, share: float, tokens: int, topk: int, experts: int) -> None:
        super().__init__()
        place = torch.arange(tokens * topk).view(tokens, topk)
        local = experts // RANKS
        there = (torch.arange(tokens) < round(share * tokens)).unsqueeze(1)
        self.ids = torch.where(there, place % local, local + place % (experts - local))
        self.counts = torch.bincount(self.ids.flatten(), minlength=experts)
        self.probs = nn.Parameter(torch.full((tokens, topk), 1 / topk))

    def forward(self, hidden: Tensor, num_sequences: int) -> Routing:
        return Routing(self.ids, self.probs, self.counts)


class Totals:
    """Sums of weight gradients in fp32, as a training loop has them."""

    def __init__(self, layer: MoELayer) -> None:
        weights = layer.experts.parameters()
        self.pair = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]

    def take(self) -> Any:
        return tuple(self.pair)


def measure(layer: MoELayer, hidden: Tensor, share: float, in_graph: bool) -> tuple[int, int]:
    """Return the bytes kept between forward and backward, and the most at one time."""
    tokens, experts = len(hidden), layer.config.num_experts
    layer.router = Scripted(share, tokens, SHAPE.topk, experts)
    with torch.no_grad():
        layer(hidden)  # the exchange's buffers grow to what they need
    grads = torch.ones_like(hidden)
    captured = patch.object(symm_mem, "_captured", lambda _: True)
    with captured if in_graph else nullcontext(), counted() as made:
        output = layer(hidden)
        kept = made.now
        output.backward(grads)
    return kept, made.most


def rank_main(rank: int, port: int) -> list[dict[str, Any]]:
    """Return a row for each way, capacity and share, as this rank counts them."""
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    groups = create_expert_groups(ParallelConfig(world_size=RANKS, ep=RANKS))
    tokens, width = SHAPE.tokens // SMALLER, SHAPE.hidden // SMALLER
    hidden = torch.randn(tokens, width).bfloat16().requires_grad_()
    rows = []
    for way, (schedule, in_graph) in WAYS.items():
        for capacity in (None, CAPACITY):
            config = MoEConfig(
                hidden_size=width,
                ffn_hidden_size=SHAPE.ffn // SMALLER,
                num_experts=SHAPE.experts * RANKS,
                # With so much room it is one pass, as without: fused, as on a GPU.
                rank_capacity=capacity or RANKS,
                dispatcher="symm_mem",
                overlap=schedule,
                gemm="torch_grouped",
            )
            layer = MoELayer(config, groups, dtype=torch.bfloat16)
            layer.experts.totals = Totals(layer)
            for share in SHARES:
                kept, most = measure(layer, hidden, share, in_graph)
                row = {"way": way, "capacity": capacity, "share": share}
                rows.append({**row, "kept": kept, "room": most})
                if not rank:
                    print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    dist.destroy_process_group()
    return rows


def count() -> None:
    """Count on 8 ranks, and keep what rank 0 found."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["room", "torch.distributed"])
    with context.Pool(RANKS) as pool:
        found = pool.starmap(rank_main, [(rank, port) for rank in range(RANKS)], chunksize=1)
    sizes = {"tokens": SHAPE.tokens, "topk": SHAPE.topk, "hidden": SHAPE.hidden, "ffn": SHAPE.ffn}
    head = {
        "date": time.strftime("%Y-%m-%d"),
        "command": "python benchmarks/room.py",
        "versions": versions(),
        "device": "cpu",
        "ranks": RANKS,
        "sizes": {**sizes, "experts": SHAPE.experts * RANKS},
        "smaller": SMALLER,
    }
    lines = ",\n    ".join(json.dumps(row) for row in found[0])
    text = json.dumps(head, indent=2).removesuffix("\n}")
    write_whole(RESULTS, f'{text},\n  "rows": [\n    {lines}\n  ]\n}}\n')


def figures() -> dict[tuple[str, float | None], list[tuple[float, float, float]]]:
    """Return (share, GB kept, GB of room) at the full size, by way and capacity."""
    found: dict[tuple[str, float | None], list[tuple[float, float, float]]] = {}
    kept = json.loads(RESULTS.read_text())
    scale = kept["smaller"] ** 2 / 1e9
    for row in kept["rows"]:
        sizes = row["share"], row["kept"] * scale, row["room"] * scale
        found.setdefault((row["way"], row["capacity"]), []).append(sizes)
    return found


def table() -> str:
    """Return the figures as a table for docs/communication.md."""
    lines = [
        ["GB of a layer; to one rank go", *(f"{share:.4g} of all tokens" for share in SHARES)],
        ["---"] * (len(SHARES) + 1),
    ]
    for (way, capacity), points in figures().items():
        name = way if capacity is None else f"{way}, `--ep-rank-capacity {capacity:g}`"
        lines.append([name, *(f"{kept:.2f} kept, {room:.2f} most" for _, kept, room in points)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw() -> None:
    """Draw the figures, a panel for each way."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(WAYS), figsize=(11, 4), sharey=True, layout="constrained")
    found = figures()
    for axes, way in zip(panels, WAYS, strict=True):
        for capacity, color in ((None, "#6b7280"), (CAPACITY, "#0f766e")):
            shares, kept, room = zip(*found[way, capacity], strict=True)
            name = "all rows at once" if capacity is None else f"--ep-rank-capacity {capacity:g}"
            at = [100 * share for share in shares]
            axes.plot(at, room, "o-", color=color, label=f"{name}: most at one time")
            axes.plot(at, kept, "o--", color=color, label=f"{name}: kept for the backward")
        axes.set_title(way, loc="left", fontsize=10)
        axes.set_xlabel("% of all tokens that go to one rank")
        axes.set_xticks([100 * share for share in SHARES], [f"{100 * s:g}" for s in SHARES])
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylim(bottom=0)
    panels[0].set_ylabel("GB")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, frameon=False, loc="outside lower center", ncols=2)
    figure.suptitle(
        f"A layer of Qwen3-30B-A3B at EP {RANKS}, {SHAPE.tokens} tokens on each rank: tensors on "
        "the fullest rank",
        fontsize=10,
    )
    write_picture(PICTURE, figure, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--draw", action="store_true", help="count nothing")
    if not parser.parse_args().draw:
        count()
    draw()


if __name__ == "__main__":
    main()
