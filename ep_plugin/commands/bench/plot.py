"""Rows as a picture: a panel for each shape, a bar for each backend, a mark at each floor.

Where bars do the same work, a line through the panel shows the fastest peer.
"""

import math
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from ep_plugin.commands.bench.contest import OURS
from ep_plugin.commands.bench.figures import Row, case_of

OUR_COLOR, PEER_COLOR = "#0f766e", "#9ca3af"
FLOOR_COLOR, GOAL_COLOR = "#b91c1c", "#1d4ed8"
BAR_INCHES = 0.24


def draw(rows: list[Row]) -> Figure:
    """Return the figure; rows of one shape and routing share a panel, the fastest on top."""
    style = {"font.size": 9, "legend.frameon": False, "text.parse_math": False}
    matplotlib.rcParams.update(style)
    panels: dict[str, list[Row]] = {}
    for row in rows:
        panels.setdefault(case_of(row), []).append(row)
    counts = [len(members) for members in panels.values()] or [1]
    alike = len(counts) > 1 and 2 * min(counts) >= max(counts)
    columns = 3 if len(counts) > 6 else 2 if alike else 1
    lines = math.ceil(len(counts) / columns)
    slots = [max(counts[columns * line :][:columns]) for line in range(lines)]
    heights = [BAR_INCHES * bars + 1.0 for bars in slots]
    size = (6.5 * columns if columns > 1 else 9.0, sum(heights) + 0.7)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False, height_ratios=heights).flatten()
    for number, (title, members) in enumerate(panels.items()):
        _panel(axes[number], title, members, slots[number // columns])
    for panel in axes[len(panels) :]:
        panel.set_visible(False)
    bench, device = (rows[0]["bench"], rows[0]["device"]) if rows else ("nothing measured", "")
    figure.suptitle(f"ep-plugin bench {bench}, {device}", fontsize=11)
    figure.legend(handles=_legend(), loc="outside lower center", ncols=4)
    return figure


def _panel(axes: Axes, title: str, rows: list[Row], slots: int) -> None:
    ordered = sorted(rows, key=lambda row: (str(row["op"]), row["ms"]))
    for place, row in enumerate(ordered):
        ours, fp8 = row["backend"].startswith(OURS), row["precision"] == "fp8"
        axes.barh(
            place,
            row["ms"],
            height=0.72,
            color=OUR_COLOR if ours else PEER_COLOR,
            alpha=1.0 if fp8 else 0.65,
        )
        axes.plot([row["floor_ms"]] * 2, [place - 0.42, place + 0.42], color=FLOOR_COLOR, lw=1.8)
        axes.annotate(
            f"{row['ms']:.3g}", (row["ms"], place), xytext=(4, 0), textcoords="offset points",
            va="center", fontsize=8, fontweight="bold" if ours else "normal",
        )  # fmt: skip
    best = min((row["ms"] for row in rows if not row["backend"].startswith(OURS)), default=None)
    if best is not None and len({row["op"] for row in rows}) == 1:
        axes.axvline(best, color=GOAL_COLOR, linestyle=":", lw=1.5)
    axes.set_yticks(range(len(ordered)), [_label(row) for row in ordered], fontsize=8)
    axes.set_ylim(slots - 0.4, -0.6)
    axes.set_xlim(0, 1.12 * max(max(row["ms"], row["floor_ms"]) for row in ordered))
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel("ms")
    axes.grid(axis="x", color="#e5e7eb")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _label(row: Row) -> str:
    graph = "graph" if row["graph"] else None
    how = row.get("dispatcher"), row.get("schedule"), graph
    return " ".join(filter(None, (row["op"], row["backend"], row["precision"], *how)))


def _legend() -> list[Any]:
    return [
        Patch(color=OUR_COLOR, label="ep_plugin (lighter: bf16)"),
        Patch(color=PEER_COLOR, label="peer (lighter: bf16)"),
        Line2D([], [], color=FLOOR_COLOR, lw=1.8, label="floor"),
        Line2D([], [], color=GOAL_COLOR, lw=1.5, linestyle=":", label="fastest peer"),
    ]
