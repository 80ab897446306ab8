"""(g) Parameters and optimizer bytes of a rank against the expert-parallel size.

Four ranks on the CPU hold a model of 64 experts in bf16 at EP 1, 2 and 4 and take a step; what each
holds is counted. The other sizes are computed from what EP 1 holds: dense + experts / EP. All
scripts share recipes/evidence/_sweep.py.
"""

import sys
from pathlib import Path
from typing import Any

from _model import Variant, top1
from _show import figure, of, save, table
from _sweep import Claim, main
from _verdict import Equal, Results

EXPERTS, RANKS = 64, 4
MEASURED, SIZES = (1, 2, 4), (1, 2, 4, 8, 16, 32, 64)
EP = "--bf16 --expert-model-parallel-size"
VARIANTS = tuple(
    Variant(f"bytes-ep{ep}", f"{top1(EXPERTS)} {EP} {ep}", steps=2, ranks=RANKS) for ep in MEASURED
)
LABELS = {variant.name: f"EP {ep}" for variant, ep in zip(VARIANTS, MEASURED, strict=True)}
PARTS = ("parameters", "parameter_bytes", "optimizer_bytes")


def computed(results: Results, ep: int) -> dict[str, float]:
    """Return what a rank holds by the rule, from the dense part and the experts at EP 1."""
    one = of(results, "bytes-ep1")[0]["ranks_hold"][0]
    return {part: one["dense"][part] + one["experts"][part] / ep for part in PARTS}


def held(run: dict[str, Any]) -> list[dict[str, float]]:
    """Return what each rank holds, dense part and experts together."""
    return [
        {part: rank["dense"][part] + rank["experts"][part] for part in PARTS}
        for rank in run["ranks_hold"]
    ]


def exact(results: Results, name: str) -> bool | None:
    """Return whether every rank holds what the rule says; None where it was not run."""
    runs, ep = of(results, name), int(name.rpartition("ep")[2])
    if not runs or not of(results, "bytes-ep1"):
        return None
    return all(rank == computed(results, ep) for rank in held(runs[0]))


def shown(results: Results) -> str:
    """Return a row for each size."""
    if not of(results, "bytes-ep1"):
        return ""
    rows = []
    for ep in SIZES:
        runs = of(results, f"bytes-ep{ep}")
        values = held(runs[0])[0] if runs else computed(results, ep)
        rows.append([str(ep), *(f"{values[part]:,.0f}" for part in PARTS)])
        rows[-1].append(f"counted on {RANKS} ranks" if runs else "computed")
    return table(("EP", "parameters", "their bytes", "optimizer bytes", "how"), rows)


def plot(results: Results, path: Path) -> None:
    """Draw the bytes against EP, what was counted as points."""
    if not of(results, "bytes-ep1"):
        return
    made, axes = figure(1)
    for part, color in (("parameter_bytes", "C0"), ("optimizer_bytes", "C1")):
        label = part.replace("_", " ")
        line = [computed(results, ep)[part] / 1e6 for ep in SIZES]
        axes[0].plot(SIZES, line, color=color, label=f"{label}: dense + experts / EP")
        there = [ep for ep in SIZES if of(results, f"bytes-ep{ep}")]
        points = [held(of(results, f"bytes-ep{ep}")[0])[0][part] / 1e6 for ep in there]
        axes[0].plot(there, points, "o", color=color, label="counted")
        dense = of(results, "bytes-ep1")[0]["ranks_hold"][0]["dense"][part] / 1e6
        axes[0].axhline(dense, color=color, linestyle=":", linewidth=1)
    axes[0].set_xscale("log", base=2)
    axes[0].set_yscale("log")
    axes[0].set_xlabel("expert-parallel ranks")
    axes[0].set_ylabel("megabytes of a rank (dotted: the dense part)")
    axes[0].grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    axes[0].set_title(f"{EXPERTS} experts in each layer, no distributed optimizer", fontsize=9)
    save(made, results, path)


SAYS = (
    "A rank holds exactly the dense parameters and 1 / EP of the experts', of parameters and of "
    "optimizer state alike, where the distributed optimizer does not cut the state over all ranks."
)
CHECKS = tuple(Equal(f"bytes-ep{ep}", exact) for ep in MEASURED[1:])
CLAIM = Claim("g", "rank_bytes", "Bytes of a rank", SAYS, VARIANTS, LABELS, CHECKS, shown, plot)

if __name__ == "__main__":
    sys.exit(main([CLAIM], "rank_bytes.py"))
