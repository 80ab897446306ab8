"""Figures of results: means over seeds, tables in Markdown, curves."""

import itertools
import statistics
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Curve = list[tuple[float, float]]


def of(results: dict[str, dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """Return a variant's results, one a seed."""
    return [value for value in results.values() if value["name"] == name]


def mean_curve(runs: list[dict[str, Any]]) -> Curve:
    """Return (tokens, mean held-out loss) over seeds; none where a run is missing."""
    columns = zip(*(run["heldout"] for run in runs), strict=True)
    return [(column[0][0], statistics.mean(loss for _, loss in column)) for column in columns]


def final(runs: list[dict[str, Any]]) -> float:
    """Return the mean over seeds of the last held-out loss."""
    return statistics.mean(run["heldout"][-1][1] for run in runs)


def loss_text(runs: list[dict[str, Any]]) -> str:
    """Return the last held-out loss, with its standard error where several seeds ran."""
    if not runs:
        return "not run"
    losses = [run["heldout"][-1][1] for run in runs]
    if len(losses) == 1:
        return f"{losses[0]:.4f}"
    error = statistics.stdev(losses) / len(losses) ** 0.5
    return f"{statistics.mean(losses):.4f} ± {error:.4f}"


def reached(curve: Curve, loss: float) -> float | None:
    """Return the tokens from which on a curve stays at `loss` or below; None if it ends above."""
    if not curve or curve[-1][1] > loss:
        return None
    for (x0, y0), (x1, y1) in itertools.pairwise(reversed(curve)):
        if y0 <= loss < y1:
            return x1 + (x0 - x1) * (y1 - loss) / (y1 - y0)
    return curve[0][0]


def sooner(fast: list[dict[str, Any]], slow: list[dict[str, Any]]) -> float | None:
    """Return in how many times fewer tokens `fast` stays at `slow`'s final loss than `slow` does.

    Each evaluation reads other samples, so a curve is at its own final loss before its end: both
    are read off in one way, and a model is 1 times as soon as itself.
    """
    at, own = (reached(mean_curve(runs), final(slow)) for runs in (fast, slow))
    return None if at is None or own is None else own / at


def table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table in Markdown, the first column to the left."""
    heads = list(heads)
    lines = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def columns(runs: list[dict[str, Any]]) -> list[str]:
    """Return what every table has of a variant: parameters, tokens, seeds."""
    one = runs[0]
    return [millions(one["parameters"]), millions(one["tokens"]), str(len(runs))]


def losses_table(results: dict[str, dict[str, Any]], labels: dict[str, str]) -> str:
    """Return a row for each variant: size, loss, and what its routers logged in the second half."""
    rows = []
    for name, label in labels.items():
        runs = of(results, name)
        if not runs:
            continue
        logged = [run["experts"] for run in runs]
        rows.append(
            [
                label,
                *columns(runs),
                loss_text(runs),
                _mean(logged, "max_over_mean", "{:.2f}"),
                _mean(logged, "dropped_fraction", "{:.2%}"),
            ]
        )
    heads = ("run", "parameters", "tokens", "seeds", "held-out loss")
    return table((*heads, "fullest expert over mean", "dropped"), rows)


def _mean(logged: list[dict[str, float]], name: str, form: str) -> str:
    found = [one[name] for one in logged if name in one]
    return form.format(statistics.mean(found)) if found else "-"


def millions(number: float) -> str:
    """Return a number of parameters or tokens in millions."""
    return f"{number / 1e6:.1f}M" if number < 1e8 else f"{number / 1e6:.0f}M"


def step_ms(runs: list[dict[str, Any]]) -> str:
    """Return the milliseconds of a step, of runs that had the machine for themselves."""
    alone = [run["step_seconds"] for run in runs if run["beside"] == 1]
    return f"{1000 * statistics.mean(alone):.1f}" if alone else "not alone"


def under(results: dict[str, dict[str, Any]]) -> str:
    """Return the line below a plot: what, on what, when."""
    one = next(iter(results.values()))
    size, epochs = one["size"], max(run["epochs"] for run in results.values())
    return (
        f"{size['layers']} layers of {size['hidden']}, {one['hardware']}, {one['date']}, corpus "
        f"{one['corpus']['sha256'][:8]}, {millions(one['corpus']['distinct_tokens'])} distinct "
        f"tokens, at most {epochs:.2g} epochs"
    )


def figure(panels: int) -> tuple[Any, Any]:
    """Return a figure of Matplotlib's with panels side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    made, axes = pyplot.subplots(1, panels, figsize=(5.5 * panels, 4.4), layout="constrained")
    return made, axes if panels > 1 else [axes]


def save(made: Any, results: dict[str, dict[str, Any]], path: Path) -> None:
    """Write the figure, with what it was made on below."""
    wide = 75 * len(made.axes)
    made.supxlabel(textwrap.fill(under(results), wide), fontsize=7, color="gray")
    made.savefig(path, dpi=110)


def draw_losses(
    axis: Any,
    results: dict[str, dict[str, Any]],
    labels: dict[str, str],
    seconds: bool = False,
) -> None:
    """Draw held-out loss of each variant that is there, against tokens or `seconds` of training."""
    there = [name for name in labels if of(results, name)]
    styles = dict(zip(there, _styles(len(there)), strict=True))
    for name, label in labels.items():
        runs = of(results, name)
        if runs:
            curve = mean_curve(runs)
            one = _seconds_of_token(runs[0]) if seconds else 1e-6
            axis.plot(
                [x * one for x, _ in curve], [y for _, y in curve], label=label, **styles[name]
            )
    axis.set_xlabel(
        "training time (s), evaluation left out" if seconds else "training tokens (millions)"
    )
    axis.set_ylabel("held-out loss (nats per token)")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    _close_up(axis, results, labels)


def _seconds_of_token(run: dict[str, Any]) -> float:
    seconds: float = run["step_seconds"] / (run["size"]["batch"] * run["size"]["sequence"])
    return seconds


def _close_up(axis: Any, results: dict[str, dict[str, Any]], labels: dict[str, str]) -> None:
    """Leave out the fall of the first points, where all curves lie on each other."""
    curves = [mean_curve(of(results, name)) for name in labels if of(results, name)]
    if not curves:
        return
    low = min(y for curve in curves for _, y in curve)
    high = max(curve[min(2, len(curve) - 1)][1] for curve in curves)
    axis.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))


def _styles(number: int) -> list[dict[str, Any]]:
    """Return how to draw so many curves: colours in their order, and of many every third alike."""
    from matplotlib import colormaps

    shades = [colormaps["viridis"](i / max(1, number - 1) * 0.92) for i in range(number)]
    lines = ("-",) if number < 8 else ("-", "--", ":")
    return [{"color": c, "linestyle": lines[i % len(lines)]} for i, c in enumerate(shades)]
