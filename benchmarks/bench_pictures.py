"""The four pictures of docs/benchmarks.md, one for each question."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from bench_rows import (
    Found,
    best,
    case_of,
    dropping,
    gains,
    is_like,
    megatron,
    one_layer,
    others,
    our_loop,
    ours,
    peers,
    tokens_per_second,
)
from matplotlib import pyplot as plt

from ep_plugin.commands.bench.contest import OURS as OURS_NAME
from ep_plugin.commands.bench.floors import Gradients
from ep_plugin.commands.bench.plot import draw
from ep_plugin.commands.bench.shapes import SHAPES
from ep_plugin.written import write_picture

OURS, THEIRS = ("#5fa8a0", "#0f766e"), ("#d1d5db", "#6b7280")  # bf16, FP8
DROPPED = "#d6b98c"  # another model, where loads are uneven
Bars = dict[str, list[float | None]]


def write(found: list[Found], folder: Path) -> None:
    """Draw all: bench_layer.png, bench_ranks.png, bench_loop.png and bench_fp8.png."""
    for name, figure in (
        ("layer", draw(_layer(found, "layer", 1, "added"))),
        ("ranks", draw(_layer(found, "overlap", 2, "anew"))),
        ("loop", _loop(found)),
        ("fp8", _fp8(found)),
    ):
        write_picture(folder / f"bench_{name}.png", figure, dpi=110)


def _newest(found: Iterable[Found]) -> list[Found]:
    """Return the rows of the card that was measured last."""
    found = list(found)
    last = max(found, key=lambda f: (f.row["date"], f.row["device"]))
    return [f for f in found if f.row["device"] == last.row["device"]]


def _layer(found: list[Found], bench: str, ranks: int, gradients: Gradients) -> list[Any]:
    """Return the rows of a picture: each side's fastest, of shapes with ours."""
    shown = [
        f
        for f in found
        if is_like(f.row, bench=bench, ep=ranks, routing="balanced", gradients=gradients)
        and f.floor() is not None
    ]
    with_peers = [f for f in shown if megatron("bf16")(f.row)]
    shown = [f for f in shown if f.row["device"] in {m.row["device"] for m in _newest(with_peers)}]
    ways = [ours(p, g) for p in ("bf16", "fp8") for g in (False, True)]
    ways += [megatron("bf16"), dropping, megatron("fp8"), peers("bf16", ("torch",)), others]
    picked = []
    for shape in SHAPES:
        own = [f for f in shown if f.row["shape"] == shape]
        if best(own, lambda row: row["backend"].startswith(OURS_NAME)) is None:
            continue
        picked += [each for way in ways if (each := best(own, way)) is not None]
    return [{**each.row, "floor_ms": each.floor()} for each in picked]


def _bars(title: str, labels: list[str], bars: Bars, colors: list[str], unit: str) -> Any:
    figure, axes = plt.subplots(figsize=(9, 0.32 * len(labels) * len(bars) + 1.4))
    height = 0.8 / len(bars)
    for number, (name, values) in enumerate(bars.items()):
        places = [i + number * height for i in range(len(labels))]
        drawn = axes.barh(
            places, [v or 0 for v in values], height, label=name, color=colors[number]
        )
        axes.bar_label(drawn, [f"{v:,.3g}" if v else "" for v in values], padding=3, fontsize=8)
    axes.set_yticks([i + 0.4 - height / 2 for i in range(len(labels))], labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    axes.set_title(title, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(fontsize=8, frameon=False, loc="outside lower center", ncols=len(bars))
    figure.set_layout_engine("constrained")
    return figure


def _loop(found: list[Found]) -> Any:
    rows = [f for f in found if f.row["bench"] == "train"]
    ways = {
        "ours bf16": our_loop("bf16"),
        "ours FP8": our_loop("fp8"),
        "Megatron bf16": megatron("bf16"),
        "Megatron FP8": megatron("fp8"),
        "Megatron bf16, drop-and-pad": dropping,
    }
    bars: Bars = {name: [] for name in ways}
    groups: dict[str, list[Found]] = {}
    for each in rows:  # over all hosts, as each side is to be at its best
        groups.setdefault(case_of(each), []).append(each)
    both = {
        case: own
        for case, own in groups.items()
        # a side alone shows nothing
        if len({f.row["backend"].split("+")[0] == OURS_NAME for f in own}) == 2
    }
    for own in both.values():
        for name, way in ways.items():
            fastest = best(own, way)
            bars[name].append(tokens_per_second(fastest) / 1e3 if fastest else None)
    labels = [case.replace(", ep=", "\nep=").replace(", tp=", "\ntp=") for case in both]
    title = "Megatron's loop: the fastest way of each side that was measured, on any host"
    colors = [*OURS, *THEIRS, DROPPED]
    return _bars(title, labels, bars, colors, "thousand tokens per second, all GPUs")


def _fp8(found: list[Found]) -> Any:
    rows = [f for f in found if one_layer(f) and f.row["gradients"] == "anew" and f.floor()]
    last = _newest(f for f in rows if ours("fp8", True)(f.row))
    rows = [f for f in rows if f.row["device"] == last[0].row["device"]]
    all_gains = {shape: gains([f for f in rows if f.row["shape"] == shape]) for shape in SHAPES}
    kept = {shape: found for shape, found in all_gains.items() if found["ours, in a graph"]}
    names = ("ours, in a graph", "Megatron", "by the floors")
    bars = {name: [found[name] for found in kept.values()] for name in names}
    device = rows[0].row["device"]
    title = f"A layer in bf16 over the same in FP8, {device}: above 1 FP8 is faster"
    return _bars(title, list(kept), bars, [OURS[1], THEIRS[1], "#b91c1c"], "times")
