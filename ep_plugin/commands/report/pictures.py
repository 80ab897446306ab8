"""The pictures of a report, as matplotlib figures."""

import math
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ep_plugin.commands.report.events import BALANCE, TRAIN, VALIDATION, Run, Series

MAX_LAYERS = 12  # with a picture of their experts
LARGEST = 1e30  # value that can be drawn
DENSE_COLOR, MOE_COLOR = "#6b7280", "#0f766e"


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of that size in inches, with the report's style."""
    matplotlib.rcParams.update(
        {
            "font.size": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.color": "#e5e7eb",
            "axes.axisbelow": True,
            "legend.frameon": False,
        }
    )
    return Figure(figsize=(width, height), layout="constrained")


def loss_figure(dense: Run, moe: Run) -> Figure:
    """Draw training and validation losses; the MoE goes on where the dense run ended."""
    figure = new_figure(8, 4.5)
    axes = figure.subplots()
    end = dense.series(TRAIN)[-1][0]
    for run, color, name in (
        (dense, DENSE_COLOR, "dense"),
        (moe, MOE_COLOR, "Mixture-of-Experts"),
    ):
        iterations, losses = _columns(run.series(TRAIN))
        axes.plot(
            iterations, losses, color=color, linewidth=1.2, alpha=0.6, label=f"{name}, training"
        )
        iterations, losses = _columns(run.series(VALIDATION))
        axes.plot(iterations, losses, "o-", color=color, markersize=4, label=f"{name}, validation")
    axes.axvline(end, color="#9ca3af", linestyle="--", linewidth=1)
    axes.annotate(
        "converted",
        (end, 1),
        xycoords=("data", "axes fraction"),
        xytext=(4, -12),
        textcoords="offset points",
        color="#6b7280",
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="iteration", ylabel="loss (nats per token)")
    axes.legend()
    return figure


def one_loss_figure(run: Run) -> Figure:
    """Draw training and validation losses of one run."""
    figure = new_figure(8, 4.5)
    axes = figure.subplots()
    style = {"color": MOE_COLOR, "linewidth": 1.2, "alpha": 0.6, **_dots(run.series(TRAIN))}
    axes.plot(*_columns(run.series(TRAIN)), label="training", **style)
    if validation := run.series(VALIDATION):
        axes.plot(*_columns(validation), "o-", color=DENSE_COLOR, markersize=4, label="validation")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="iteration", ylabel="loss (nats per token)")
    axes.legend()
    return figure


def speed_figure(run: Run) -> Figure:
    """Draw seconds per iteration, without the first log."""
    figure = new_figure(8, 2.6)
    axes = figure.subplots()
    series = run.series("iteration-time")[1:]
    axes.plot(*_columns(series), color=DENSE_COLOR, linewidth=1.2, **_dots(series))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="iteration", ylabel="seconds")
    axes.set_ylim(bottom=0)
    return figure


def balance_figure(moe: Run) -> Figure:
    """Draw the load-balancing loss; 1 is perfect balance."""
    figure = new_figure(8, 2.6)
    axes = figure.subplots()
    series = moe.series(BALANCE)
    axes.plot(*_columns(series), color=MOE_COLOR, linewidth=1.2, **_dots(series))
    axes.axhline(1, color="#9ca3af", linestyle="--", linewidth=1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="iteration", ylabel="load-balancing loss")
    return figure


def experts_figure(moe: Run) -> Figure:
    """Draw `shares_figure` of all layers, or the first MAX_LAYERS of them."""
    return shares_figure(dict(list(moe.shares().items())[:MAX_LAYERS]))


def shares_figure(shares: dict[int, dict[int, Series]]) -> Figure:
    """Draw each expert's share of rows over time, one map per layer, one scale for all.

    Where an expert has no value of an iteration that another has, the map has a gap.
    """
    columns = min(2, len(shares))
    rows = math.ceil(len(shares) / columns)
    figure = new_figure(4 * columns, 2.4 * rows + 0.4)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten()
    every = (v for layer in shares.values() for series in layer.values() for _, v in series)
    highest = max((v for v in every if 0 < v < LARGEST), default=1.0)
    for axes, (layer, experts) in zip(panels, shares.items(), strict=False):
        values = [dict(series) for series in experts.values()]
        iterations = sorted(set.union(*(set(value) for value in values)))
        grid = [[_drawable(value.get(i, math.nan)) for i in iterations] for value in values]
        step = iterations[-1] - iterations[-2] if len(iterations) > 1 else 1
        image = axes.imshow(
            grid,
            aspect="auto",
            origin="lower",
            cmap="viridis",
            vmin=0,
            vmax=highest,
            interpolation="nearest",
            extent=(iterations[0] - step, iterations[-1], -0.5, len(grid) - 0.5),
        )
        axes.set_title(f"layer {layer}", loc="left", fontsize=10)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.grid(visible=False)
    for axes in panels[len(shares) :]:
        axes.set_visible(False)
    figure.supxlabel("iteration", fontsize=10)
    figure.supylabel("expert", fontsize=10)
    even = 1 / len(next(iter(shares.values())))
    bar = figure.colorbar(
        image, ax=list(panels), label="share of the layer's rows", shrink=0.8, aspect=20 * rows
    )
    bar.ax.axhline(even, color="white", linewidth=1.5)
    return figure


def _dots(series: Series) -> dict[str, Any]:
    """Return a marker for a series of one value, which a line does not show."""
    return {"marker": "o", "markersize": 4} if len(series) == 1 else {}


def _columns(series: Series) -> tuple[list[int], list[float]]:
    return [iteration for iteration, _ in series], [_drawable(value) for _, value in series]


def _drawable(value: float) -> float:
    return value if abs(value) < LARGEST else math.nan
