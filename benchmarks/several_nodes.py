"""What a layer takes over several hosts, foreseen: nobody has measured it.

python benchmarks/several_nodes.py

Compute is measured: the layer of one H200, gradients added, launched by the host (the file below).
Exchanges are the network model of `ep-plugin plan`: eight GPUs of a host on NVLink, a 400 Gb/s
adapter for each between hosts. Experts are spread over EP ranks; more GPUs than that are replicas,
whose exchanges are the same.
"""

from pathlib import Path
from typing import NamedTuple

from bench_rows import best, is_like, load, ours

from ep_plugin.commands.bench.floors import PRECISIONS
from ep_plugin.commands.bench.shapes import SHAPES
from ep_plugin.commands.plan.network import NETWORKS, Traffic, forecast

ROWS = Path(__file__).parent / "results" / "peers_h200.json"
NETWORK = NETWORKS["nvlink8"]
CHUNKS = 3


class Model(NamedTuple):
    """A model, and the shape of the bench that is one rank's part of it."""

    name: str
    shape: str
    experts: int
    topk: int


MODELS = (
    Model("DeepSeek-V3", "dsv3", 256, 8),
    Model("Qwen3-235B-A22B", "q3-235b", 128, 8),
    Model("Qwen3-30B-A3B", "q3-30b-ep8", 128, 8),
)
RANKS = (8, 16, 64, 128, 256)


def table() -> str:
    """Return the exchanges and steps of each model, precision and EP."""
    found = [f for f in load() if f.file == ROWS.name and is_like(f.row, gradients="added", ep=1)]
    head = ["model", "experts in", "EP", "compute", "exchanges: flat", "dedup", "hierarchical"]
    head += ["the same, dispatch in e4m3", "step, the fastest", f"in {CHUNKS} chunks"]
    head += ["of one GPU's speed"]
    lines = [head, ["---"] * len(head)]
    for model in MODELS:
        shape = SHAPES[model.shape]
        rows = shape.tokens * shape.topk  # of a rank; its own tokens have `topk` choices each
        sizes = rows // model.topk, model.topk, shape.hidden, model.experts
        for precision in PRECISIONS:
            own = [f for f in found if f.row["shape"] == model.shape]
            each = best(own, ours(precision, False))
            assert each is not None, f"no row of {model.shape} in {ROWS.name}"
            for ep in (ranks for ranks in RANKS if ranks <= model.experts):
                figures = _figures(sizes, ep, each.ms, precision == "fp8")
                lines.append([model.name, precision, str(ep), *figures])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _figures(sizes: tuple[int, int, int, int], ep: int, compute: float, eight: bool) -> list[str]:
    """Return the cells of one line; `eight`: experts in e4m3, whose tokens may travel so."""
    wide, narrow = Traffic(*sizes), Traffic(*sizes, dispatch_bytes=1.0)
    ways = [(wide, "flat"), (wide, "dedup"), (wide, "hierarchical")]
    ways += [(narrow, "hierarchical")] if eight else []
    # `hierarchical` has no chunks: it cannot exchange with some ranks at a time.
    in_chunks = [(narrow if eight else wide, how) for how in ("flat", "dedup")]
    whole, parts = (
        [forecast(traffic, NETWORK, ep, how, compute, chunks) for traffic, how in tried]
        for tried, chunks in ((ways, 1), (in_chunks, CHUNKS))
    )
    step, chunked = (min(each.step_ms for each in found) for found in (whole, parts))
    times = [f"{each.exchange_ms:.1f}" for each in whole] + ([] if eight else ["-"])
    ends = f"{step:.1f}", f"{chunked:.1f}", f"{compute / min(step, chunked):.2f}"
    return [f"{compute:.1f}", *times, *ends]


if __name__ == "__main__":
    print(table())
