"""(e) A dense model grown into experts, beside experts trained from the start, at equal cost.

All scripts share recipes/evidence/_sweep.py.
"""

import sys
from pathlib import Path

from _model import HALF, TOP2, Variant
from _show import columns, draw_losses, figure, loss_text, of, save, table
from _sweep import Claim, Results, main
from _verdict import Less

START = "dense-half"
TO_8 = "--num-experts 8 --topk 2"
CONVERT = {
    "copy": TO_8,
    "granular": "--num-experts 16 --topk 4 --mode granular --granularity 2",
    "drop": f"{TO_8} --mode drop --skip-parity",
    "noise": f"{TO_8} --mode noise --noise-std 0.05 --skip-parity",
}
FLAGS = {
    **dict.fromkeys(("copy", "drop", "noise"), f"--num-experts 8 {TOP2}"),
    "granular": f"--num-experts 16 --moe-router-topk 4 {HALF}",
}
VARIANTS = (
    Variant(START, share=0.5, keep=True),
    Variant("top2-e8", f"--num-experts 8 {TOP2}"),
    Variant("dense-continued", grown_from=START),
    *(Variant(f"grown-{m}", FLAGS[m], grown_from=START, convert=CONVERT[m]) for m in CONVERT),
)
LABELS = {
    START: "the dense model",
    "dense-continued": "the dense model goes on",
    "top2-e8": "8 experts from the start",
    **{f"grown-{mode}": f"grown, {mode}" for mode in CONVERT},
}


def shown(results: Results) -> str:
    """Return a row for each way to spend the extra tokens."""
    rows = []
    for name, label in LABELS.items():
        runs = of(results, name)
        if not runs:
            continue
        points = runs[0]["heldout"]
        rows.append(
            [
                label,
                *columns(runs),
                f"{points[0][1]:.4f}",
                f"{points[len(points) // 4 - 1][1]:.4f}",
                loss_text(runs),
            ]
        )
    heads = ("run", "parameters", "extra tokens", "seeds", "loss at 1/20", "at 1/4", "at the end")
    return table(heads, rows)


def plot(results: Results, path: Path) -> None:
    """Draw loss against extra tokens."""
    made, axes = figure(1)
    draw_losses(axes[0], results, {k: v for k, v in LABELS.items() if k != START})
    start = of(results, START)
    if start:
        axes[0].axhline(start[0]["heldout"][-1][1], color="gray", linestyle=":", linewidth=1)
    axes[0].set_xlabel("extra training tokens (millions)")
    axes[0].set_title(
        "Top-2 of 8 experts, grown and from the start (dotted: the dense model)", fontsize=9
    )
    save(made, results, path)


SAYS = (
    "A dense model grown into experts is ahead of experts trained from the start with the same "
    "further tokens, and of the dense model that goes on."
)
CHECKS = (
    *(Less(f"grown-{mode}", "top2-e8") for mode in CONVERT),
    *(Less(f"grown-{mode}", "dense-continued") for mode in CONVERT),
)
CLAIM = Claim("e", "grown", "Grown experts", SAYS, VARIANTS, LABELS, CHECKS, shown, plot)

if __name__ == "__main__":
    sys.exit(main([CLAIM], "grown.py"))
