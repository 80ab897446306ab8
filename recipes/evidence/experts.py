"""(a) Loss against the number of experts, top-1, at equal active FLOPs.

All scripts share recipes/evidence/_sweep.py.
"""

import itertools
import sys
from functools import partial
from pathlib import Path

from _model import DENSE, E8, Variant, top1
from _show import (
    columns,
    draw_losses,
    figure,
    loss_text,
    of,
    save,
    sooner,
    step_ms,
    table,
)
from _sweep import Claim, Results, main
from _verdict import Check, Less, Sooner

EXPERTS = (1, 2, 4, 8, 16, 32, 64)
LABELS = {"dense": "dense", **{f"top1-e{e}": f"{e} experts" for e in EXPERTS[1:]}}
VARIANTS = (
    DENSE,
    *(E8 if e == 8 else Variant(f"top1-e{e}", top1(e)) for e in EXPERTS[1:]),
)


def shown(labels: dict[str, str], kind: str, results: Results) -> str:
    """Return a row for each number of experts, beside the dense model."""
    dense = of(results, "dense")
    rows = []
    for name, label in labels.items():
        runs = of(results, name)
        if not runs:
            continue
        part = "-"
        if dense and name != "dense":
            times = sooner(runs, dense)
            part = "never" if times is None else f"1/{times:.2f}"
        rows.append(
            [
                label,
                *columns(runs),
                loss_text(runs),
                part,
                step_ms(runs),
            ]
        )
    heads = (f"{kind} of", "parameters", "tokens", "seeds", "held-out loss")
    return table((*heads, "dense model's loss after", "ms a step"), rows)


def plot(labels: dict[str, str], title: str, results: Results, path: Path) -> None:
    """Draw loss against tokens and, of runs alone on their machine, against time."""
    alone = {k: v for k, v in results.items() if v["beside"] == 1}
    made, axes = figure(2 if alone else 1)
    draw_losses(axes[0], results, labels)
    if alone:
        draw_losses(axes[1], alone, labels, seconds=True)
        axes[1].set_ylim(axes[0].get_ylim())
    made.suptitle(title)
    save(made, results, path)


def of_numbers(
    letter: str,
    name: str,
    about: str,
    kind: str,
    says: str,
    variants: tuple[Variant, ...],
    labels: dict[str, str],
    more: tuple[Check, ...],
) -> Claim:
    """Return the claim that more experts of a kind give a lower loss, at every doubling."""
    doublings = (Less(after, before) for before, after in itertools.pairwise(labels))
    drawn = partial(plot, labels, f"Experts, {kind}, equal active FLOPs")
    checks = (*doublings, *more)
    return Claim(
        letter, name, about, says, variants, labels, checks, partial(shown, labels, kind), drawn
    )


SAYS = (
    "More experts at equal active FLOPs give a lower loss, at every doubling; 8 experts have the "
    "dense model's final loss after at most 1/1.5 of the tokens, 64 after at most half."
)
MORE = (Less("top1-e8", "dense"), Sooner("top1-e8", "dense", 1.5), Sooner("top1-e64", "dense", 2.0))
CLAIM = of_numbers("a", "experts", "Number of experts", "top-1", SAYS, VARIANTS, LABELS, MORE)

if __name__ == "__main__":
    sys.exit(main([CLAIM], "experts.py"))
