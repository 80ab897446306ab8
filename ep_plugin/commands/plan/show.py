"""The rows of `ep-plugin plan`, as a table and as a picture."""

import argparse
from collections.abc import Iterable

from ep_plugin.commands.numbers import rounded, short_count
from ep_plugin.commands.plan.network import HOWS, ONE_DOMAIN, Forecast
from ep_plugin.commands.plan.row_types import Fit, Held, HybridFit, Kind, Measured
from ep_plugin.errors import ConfigError
from ep_plugin.written import check_picture, write_picture


def table(rows: list[Forecast]) -> str:
    """Return a line for each row."""
    lines = [
        f"{'ep':>4} {'sent':13} {'NVLink MiB':>11} {'rail MiB':>9} {'exchange ms':>12} "
        f"{'hidden':>7} {'step ms':>8}"
    ]
    for row in rows:
        lines.append(
            f"{row.ep:4} {row.how:13} {rounded(row.inside_mib, 1):>11} "
            f"{rounded(row.outside_mib, 1):>9} {rounded(row.exchange_ms, 2):>12} "
            f"{row.hidden_share:7.0%} {rounded(row.step_ms, 2):>8}"
        )
    return "\n".join(lines)


def fit_table(rows: list[Fit], gpu_gb: float) -> str:
    """Return a line for each layout."""
    lines = [
        f"{'ep':>4} {'edp':>4} {'stage':>5} {'dense':>8} {'experts':>8} {'weights GB':>11} "
        f"{'Adam GB':>8} {'activations GB':>15} {'total GB':>9}  fits {gpu_gb:g} GB"
    ]
    for row in rows:
        held = row.memory
        lines.append(
            f"{row.ep:4} {row.edp:4} {held.stage:5} {short_count(held.dense_params):>8} "
            f"{short_count(held.expert_params):>8} {rounded(held.weights / 1e9, 1):>11} "
            f"{rounded(held.optimizer / 1e9, 1):>8} {rounded(held.activations / 1e9, 1):>15} "
            f"{rounded(row.total_gb, 1):>9}  {'yes' if row.fits else 'no'}"
        )
    return "\n".join(lines)


def hybrid_tables(kinds: list[Kind], rows: list[HybridFit], args: argparse.Namespace) -> str:
    """Return a line for each kind of layer, for each layout, and for each kind on its GPU."""
    lines = [f"{'':18} {'layers':>6} {'parameters':>15} {'MFLOP of a token, forward':>27}"]
    for kind in kinds:
        of = f"{kind.symbol} {kind.name}" if kind.name != kind.symbol else kind.name
        lines.append(f"{of:18.18} {kind.layers:6} {kind.params:15,} {kind.flops / 1e6:27,.1f}")
    work = sum(kind.flops for kind in kinds)
    whole, params = "the whole model", sum(kind.params for kind in kinds)
    layers = sum(kind.layers for kind in kinds if kind.name != kind.symbol)
    lines += [f"{whole:18} {layers:6} {params:15,} {work / 1e6:27,.1f}", ""]
    trained = sum(kind.trained_flops for kind in kinds)
    lines += [f"a token's step, forward and backward: {trained / 1e6:,.1f} MFLOP", ""]
    lines.append(
        f"{'ep':>4} {'edp':>4} {'stage':>5} {'weights GB':>11} {'gradients GB':>13} "
        f"{'Adam GB':>8} {'activations GB':>15} {'total GB':>9}  fits {args.gpu_gb:g} GB"
    )
    for row in rows:
        lines.append(
            f"{row.ep:4} {row.edp:4} {row.stage:5} {_bytes(row.kinds)} "
            f"{rounded(row.total_gb, 1):>9}  {'yes' if row.fits else 'no'}"
        )
    shown = next((row for row in rows if row.fits), rows[-1])
    lines += ["", f"one GPU of stage {shown.stage} at ep {shown.ep}:"]
    lines.append(
        f"{'':10} {'parameters':>14} {'weights GB':>11} {'gradients GB':>13} {'Adam GB':>8} "
        f"{'activations GB':>15}"
    )
    lines += [f"{held.symbol:10} {held.params:14,} {_bytes([held])}" for held in shown.kinds]
    return "\n".join(lines)


def _bytes(kinds: Iterable[Held]) -> str:
    widths = {"weights": 11, "gradients": 13, "optimizer": 8, "activations": 15}
    every = list(kinds)
    sums = {name: sum(getattr(held, name) for held in every) / 1e9 for name in widths}
    return " ".join(f"{rounded(sums[name], 2):>{width}}" for name, width in widths.items())


def draw(rows: list[Forecast], measured: list[Measured], args: argparse.Namespace) -> None:
    """Write the picture, with what was `measured`; raises ConfigError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(f"--plot needs matplotlib ({error}); leave --plot out") from error
    check_picture(args.plot, "--plot")
    figure = Figure(figsize=(9.5, 6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    for index, how in enumerate((*HOWS, *ONE_DOMAIN)):
        color = f"C{index}"
        mine = [row for row in rows if row.how == how]
        ranks = [str(row.ep) for row in mine]
        top.plot(ranks, [row.exchange_ms for row in mine], color, marker="o", label=how)
        bottom.plot(ranks, [100 * row.hidden_share for row in mine], color, marker="o", label=how)
        seen = [row for row in measured if row.how == how and str(row.ep) in ranks]
        if seen:
            places = [str(row.ep) for row in seen]
            crosses = {"color": color, "marker": "x", "s": 60, "label": f"{how}, measured"}
            top.scatter(places, [row.exchange_ms for row in seen], **crosses)
            bottom.scatter(places, [100 * row.hidden_share for row in seen], **crosses)
    flat = [row for row in rows if row.how == HOWS[0]]
    style = {"color": "black", "linewidth": 0.8, "linestyle": "--", "label": "compute"}
    top.plot([str(row.ep) for row in flat], [row.compute_ms for row in flat], **style)
    top.set_ylabel("exchange of a step (ms)")
    bottom.set_ylabel(f"hidden in {args.chunks} chunks (%)")
    bottom.set_xlabel("expert-parallel ranks")
    bottom.set_ylim(0, 105)
    top.set_title(f"{args.network}: {args.tokens} tokens, top-{args.topk}, hidden {args.hidden}")
    figure.legend(*top.get_legend_handles_labels(), loc="outside right upper", frameon=False)
    write_picture(args.plot, figure, dpi=120)
