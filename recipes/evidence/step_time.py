"""(h) Time of a step against the number of experts, at fixed tokens.

Run it with --jobs 1: only then has a run the machine for itself. Several --seeds are rounds, one
after the other, and a ratio is of one round. All scripts share recipes/evidence/_sweep.py.
"""

import statistics
import sys
from pathlib import Path
from typing import Any

from _model import Variant, top1
from _show import figure, millions, of, save, table
from _sweep import Claim, main
from _verdict import AtMost, Results

STEPS = 40
EXPERTS = (1, 2, 4, 8, 16, 32, 64)
NAMES = {e: f"step-e{e}" if e > 1 else "step-dense" for e in EXPERTS}
VARIANTS = tuple(Variant(n, top1(e) if e > 1 else "", steps=STEPS) for e, n in NAMES.items())
LABELS = {name: f"{e} experts" if e > 1 else "dense" for e, name in NAMES.items()}


def ratios(results: Results, name: str) -> list[float]:
    """Return a variant's step time over the dense model's, of each round that has both, alone."""
    dense = {run["seed"]: run for run in of(results, NAMES[1]) if run["beside"] == 1}
    return [
        run["step_seconds"] / dense[run["seed"]]["step_seconds"]
        for run in of(results, name)
        if run["beside"] == 1 and run["seed"] in dense
    ]


def shown(results: Results) -> str:
    """Return a row for each number of experts."""
    rows = []
    for name, label in LABELS.items():
        runs: list[dict[str, Any]] = of(results, name)
        found = ratios(results, name)
        if runs and found:
            step = statistics.median(1000 * run["step_seconds"] for run in runs)
            low, high = min(found), max(found)
            spread = f"{low:.2f} to {high:.2f}" if len(found) > 1 else "-"
            middle = f"{statistics.median(found):.2f}"
            size = millions(runs[0]["parameters"])
            rows.append([label, size, str(len(found)), f"{step:.1f}", middle, spread])
    heads = ("top-1 of", "parameters", "rounds", "ms a step", "over dense", "least to most")
    return table(heads, rows)


def plot(results: Results, path: Path) -> None:
    """Draw the ratio against the number of experts."""
    made, axes = figure(1)
    found = {e: ratios(results, name) for e, name in NAMES.items()}
    there = {e: values for e, values in found.items() if values}
    axes[0].plot(list(there), [statistics.median(v) for v in there.values()], marker="o")
    axes[0].fill_between(
        list(there), [min(v) for v in there.values()], [max(v) for v in there.values()], alpha=0.2
    )
    axes[0].set_xscale("log", base=2)
    axes[0].set_ylim(bottom=0)
    axes[0].set_xlabel("experts (1: dense)")
    axes[0].set_ylabel("step time over the dense model's")
    axes[0].grid(alpha=0.3)
    axes[0].set_title("Step time at fixed tokens, one rank, equal active FLOPs", fontsize=9)
    save(made, results, path)


SAYS = (
    "At fixed tokens and equal active FLOPs the time of a step hardly grows with the number of "
    "experts: at most 1.25 times the dense model's with 8, at most 1.5 times with 64."
)
CHECKS = (AtMost("step-e8", 1.25, ratios), AtMost("step-e64", 1.5, ratios))
CLAIM = Claim("h", "step_time", "Time of a step", SAYS, VARIANTS, LABELS, CHECKS, shown, plot)

if __name__ == "__main__":
    sys.exit(main([CLAIM], "step_time.py"))
