"""The tables of docs/evidence.md, from the results that are kept: page.py > docs/evidence.md.

The claims are those of recipes/evidence/several.py.
"""

import argparse
import sys

from _run import ROOT
from _show import table
from _sweep import Claim, Results, read
from _verdict import whole
from several import MODULES

HEAD = """# Evidence

Whether more experts pay, on real runs. This page is printed from the results that are kept, by
`python recipes/evidence/page.py > docs/evidence.md`. How to make them again is in
[recipes/evidence](../recipes/evidence/README.md).

The text of the CPU size is Python's standard library and the installed packages: sources,
documentation, licences; each content once. The GPU size has a larger one: books, laws,
documentation and sources of [twenty repositories](../recipes/evidence/README.md#the-larger-text).
Held-out files are others than those trained on, but files of one source resemble each other.
A loss is that of the held-out files at the end of the run, in nats per token, with its standard
error where several seeds ran. Whether what was seen supports a claim is computed from the table:
a difference below the noise says nothing, where the noise is twice the standard error of the
difference, or half a percent (of an imbalance 5 %) where fewer than two seeds ran.
An evaluation reads as many tokens as the held-out files have, from where the one before it ended in
files that are shuffled anew each time: bumps that all curves of a plot share are of that reading,
which is the same in every run of a seed.
Gates of top-1 are multiplied by the number of experts (`--moe-router-topk-scaling-factor E`), as a
bare one starts at 1/E; (s) has both. At the GPU size top-1 trains with a balancing loss of 1e-3,
the better one in (s), and all else with 1e-2. Aimed at and not there yet: three seeds of 1, 8 and
64 experts and of (e) over 100M tokens.
"After 1/1.5 of the tokens" compares where two curves come down to a loss, the dense model's final
one, and stay there. Both are read off in one way, as the dense model's own curve is there before
its end, where an evaluation reads other samples. Learning rates fall to their end only with the
last token: a run planned for fewer tokens would be lower there, so these figures are cautious.
"""

KEPT = {
    "cpu": "CPU size",
    "gpu": "GPU size",
    "gpu_20m": "GPU size, 20M tokens",
    "gpu_small_text": "GPU size, an earlier and smaller text, gates not scaled",
}
# Columns of the first table, each with the sizes that count, the largest first.
SUMMARY = {"on the CPU": ("cpu",), "on a GPU": ("gpu", "gpu_20m")}


def page() -> str:
    """Return the page: a section for each claim, a table for each size that has results."""
    kept = {name: read(ROOT / "benchmarks" / "results" / f"evidence_{name}.json") for name in KEPT}
    parts = [HEAD, _summary(kept)]
    for claim in (module.CLAIM for module in MODULES):
        parts.append(f"## ({claim.letter}) {claim.about}\n\nClaim: {claim.says}\n")
        tables = [text for name in KEPT if (text := _table(claim, kept[name], name))]
        parts += tables or ["Not run yet.\n"]
    return "\n".join(parts)


def _summary(kept: dict[str, Results]) -> str:
    """Return what the largest runs on each machine say of each claim: a row for each claim."""
    rows = []
    for claim in (module.CLAIM for module in MODULES):
        found = [_said(claim, [kept[size] for size in sizes]) for sizes in SUMMARY.values()]
        rows.append([f"({claim.letter}) {claim.about}", *found])
    text = table(("claim", *SUMMARY), rows)
    return f"What the largest runs say of each claim, with the tokens of a curve:\n\n{text}"


def _said(claim: Claim, sizes: list[Results]) -> str:
    """Return the verdict of the first size that is whole, else of the first, and its tokens."""
    names = {variant.name for variant in claim.variants}
    found = []
    for results in sizes:
        verdict = whole(check.judge(results).answer for check in claim.checks)
        if not verdict.endswith("not run"):
            tokens = max(run.get("tokens", 0) for run in results.values() if run["name"] in names)
            size = f" ({tokens / 1e6:.3g}M)" if tokens > 1e5 else ""
            found.append(verdict.replace(" the claim", "") + size)
    if not found:
        return "counted on the CPU alone" if all(v.ranks for v in claim.variants) else "not run"
    return next((text for text in found if "as far as" not in text), found[0])


def _table(claim: Claim, results: Results, size: str) -> str:
    names = {variant.name for variant in claim.variants}
    own = {key: value for key, value in results.items() if value["name"] in names}
    if len(own) < 2:  # one run that several claims share says nothing alone
        return ""
    first = next(iter(own.values()))
    dates = sorted({value["date"] for value in own.values()})
    versions = ", ".join(f"{name} {number}" for name, number in first["versions"].items())
    picture = f"{claim.name}_{size}.png"
    shown = ROOT / "benchmarks" / "evidence" / picture
    drawn = f"![{claim.name}](../benchmarks/evidence/{picture})\n" if shown.is_file() else ""
    corpus, epochs = first["corpus"], max(value["epochs"] for value in own.values())
    return (
        f"{KEPT[size]}: {first['hardware']}, {versions}, {' to '.join(dates)}; "
        f"{corpus['distinct_tokens']:,} distinct tokens (SHA-256 {corpus['sha256'][:12]}), at most "
        f"{epochs:.2f} epochs, {corpus['heldout_tokens']:,} held out.\n\n"
        f"{claim.shown(own)}\n{drawn}"
    )


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    sys.stdout.write(page())
