"""How a layer's time and memory scale with expert parallelism, rows per rank being equal.

python benchmarks/scaling.py ROWS.json [MORE.json ...] [--plot F]

Reads rows of `ep-plugin bench layer` (EP=1) and `bench overlap` (EP>1). Of each shape, backend and
precision the fastest way at each EP counts, in CUDA graphs and launched by the host apart.
Efficiency is the time at EP=1 over the time at this EP: 1 where exchanges cost nothing. No times
and no bandwidths are shown of rows from a CPU.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from ep_plugin.commands.bench.contest import OURS
from ep_plugin.commands.bench.figures import EMPTY, Row, merge, read
from ep_plugin.errors import ConfigError

AIM = 0.92  # of EP=8 over EP=1
Series = dict[int, Row]  # by EP


def series(rows: list[Row]) -> dict[tuple[str, ...], Series]:
    """Return the fastest rows by EP of each shape, backend, precision and way of launching."""
    found: dict[tuple[str, ...], Series] = {}
    for row in ({**EMPTY, **row} for row in rows):
        if row["bench"] in ("layer", "overlap") and row["routing"] == "balanced":
            launched = "graph" if row["graph"] else "no graph"
            if row["gradients"] == "added":
                launched += ", added"
            name = row["device"], row["shape"], row["backend"], row["precision"], launched
            by_ep = found.setdefault(name, {})
            fastest = by_ep.get(row["ep"], row)
            by_ep[row["ep"]] = min(fastest, row, key=lambda row: row["ms"])
    return {
        name: dict(sorted(by_ep.items()))
        for name, by_ep in sorted(found.items())
        if 1 in by_ep and len(by_ep) > 1
    }


def efficiency(by_ep: Series, ep: int) -> float:
    """Return the time at EP=1 over that at `ep`."""
    return float(by_ep[1]["ms"] / by_ep[ep]["ms"])


def table(found: dict[tuple[str, ...], Series]) -> str:
    """Return a line for each EP of each series."""
    heading = ("ms", "efficiency", "exchange ms", "GB/s", "beside work", "kept MiB", "way")
    lines = [f"{'':53}" + "".join(f"{name:>13}" for name in heading)]
    for name, by_ep in found.items():
        device, *what = name
        for ep, row in by_ep.items():
            gpu = device != "cpu"
            cells = [
                f"{row['ms']:.2f}" if gpu else "",
                f"{efficiency(by_ep, ep):.2f}",
                f"{row['exchange_ms']:.2f}" if gpu and row["exchange_ms"] else "",
                f"{row['gbps']:.0f}" if gpu and row["gbps"] else "",
                f"{row['covered_share']:.0%}" if row["covered_share"] is not None else "",
                f"{row['saved_mib']:.0f}" if row["saved_mib"] is not None else "",
            ]
            way = " ".join(filter(None, (row["dispatcher"], row["schedule"])))
            figures = "".join(f"{cell:>13}" for cell in cells)
            lines.append(f"{' '.join(what):44} EP={ep:<5}{figures}  {way}")
    return "\n".join(lines)


def draw(found: dict[tuple[str, ...], Series]) -> Any:
    """Return the figure: efficiency over EP, a panel for each shape, the aim as a line."""
    from matplotlib.figure import Figure

    shapes = list(dict.fromkeys(name[1] for name in found))
    figure = Figure(figsize=(4.2 * len(shapes), 3.8), layout="constrained")
    panels = figure.subplots(1, len(shapes), squeeze=False, sharey=True)[0]
    for axes, shape in zip(panels, shapes, strict=True):
        for (_, of_shape, *what), by_ep in found.items():
            if of_shape == shape:
                line = "-" if what[0].startswith(OURS) else ":"
                values = [efficiency(by_ep, ep) for ep in by_ep]
                axes.plot(list(by_ep), values, line, marker="o", label=" ".join(what))
        axes.axhline(AIM, color="#b91c1c", lw=1)
        axes.set_title(shape, loc="left", fontsize=10)
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks := sorted({ep for by_ep in found.values() for ep in by_ep}))
        axes.set_xticklabels([str(ep) for ep in ticks])
        axes.set_xlabel("EP")
        axes.set_ylim(0, 1.1)
        axes.grid(color="#e5e7eb")
        axes.legend(fontsize=7, loc="lower left", frameon=False)
    panels[0].set_ylabel(f"time at EP=1 over time at EP (line: {AIM})")
    return figure


def main() -> int:
    """Read, print, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="+", type=Path)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="PNG")
    args = parser.parse_args()
    try:
        rows: list[Row] = []
        for path in args.rows:
            if not path.is_file():
                raise ConfigError(f"{path}: is no file; use one that bench --output wrote")
            rows = merge(rows, read(path))
        found = series(rows)
        if not found:
            raise ConfigError(
                f"{', '.join(map(str, args.rows))}: no shape has rows at EP=1 and at another EP; "
                "add those of bench layer and of bench overlap"
            )
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(found))
    if args.plot is not None:
        draw(found).savefig(args.plot, dpi=144)
    return 0


if __name__ == "__main__":
    sys.exit(main())
