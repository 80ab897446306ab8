"""(a) More experts at equal active FLOPs give a lower loss.

All scripts share recipes/evidence/_sweep.py.
"""

import sys
from pathlib import Path

from _model import TOP1, Variant
from _show import (
    draw_losses,
    figure,
    final,
    loss_text,
    mean_curve,
    millions,
    of,
    reached,
    save,
    step_ms,
    table,
)
from _sweep import Claim, Results, main

EXPERTS = (1, 2, 4, 8, 16, 32, 64)
LABELS = {"dense": "dense", **{f"top1-e{e}": f"{e} experts" for e in EXPERTS[1:]}}
VARIANTS = (
    Variant("dense"),
    *(Variant(f"top1-e{e}", f"--num-experts {e} {TOP1}") for e in EXPERTS[1:]),
)


def shown(results: Results) -> str:
    """Return a row for each number of experts, beside the dense model."""
    dense = of(results, "dense")
    rows = []
    for name, label in LABELS.items():
        runs = of(results, name)
        if not runs:
            rows.append([label, *["not run"] * 6])
            continue
        sooner = "-"
        if dense:
            at = reached(mean_curve(runs), final(dense))
            sooner = "never" if at is None else f"1/{runs[0]['tokens'] / at:.2f}"
        rows.append(
            [
                label,
                millions(runs[0]["parameters"]),
                millions(runs[0]["tokens"]),
                str(len(runs)),
                loss_text(runs),
                sooner,
                step_ms(runs),
            ]
        )
    heads = ("top-1 of", "parameters", "tokens", "seeds", "held-out loss")
    return table((*heads, "dense model's loss after", "ms a step"), rows)


def plot(results: Results, path: Path) -> None:
    """Draw loss against tokens and, of runs alone on their machine, against time."""
    alone = {k: v for k, v in results.items() if v["beside"] == 1}
    made, axes = figure(2 if alone else 1)
    draw_losses(axes[0], results, LABELS)
    if alone:
        draw_losses(axes[1], alone, LABELS)
        axes[1].clear()
        for line, name in zip(
            axes[0].get_lines(), [n for n in LABELS if of(results, n)], strict=True
        ):
            runs = of(alone, name)
            if runs:
                per_token = runs[0]["step_seconds"] * runs[0]["heldout"][-1][0] / runs[0]["tokens"]
                steps = runs[0]["tokens"] / (runs[0]["size"]["batch"] * runs[0]["size"]["sequence"])
                x = [t / runs[0]["tokens"] * steps * per_token for t, _ in mean_curve(runs)]
                y = [loss for _, loss in mean_curve(runs)]
                axes[1].plot(x, y, color=line.get_color(), label=LABELS[name])
        axes[1].set_ylim(axes[0].get_ylim())
        axes[1].set_xlabel("training time (s), evaluation left out")
        axes[1].grid(alpha=0.3)
    made.suptitle("Experts, top-1, equal active FLOPs")
    save(made, results, path)


CLAIM = Claim("a", "experts", __doc__.splitlines()[0][4:], VARIANTS, shown, plot)

if __name__ == "__main__":
    sys.exit(main([CLAIM], "experts.py"))
