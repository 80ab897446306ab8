"""What every script of the evidence does: run what is missing, keep it, show all of it.

It takes recipes/evidence/_model.py for the models, recipes/evidence/_run.py for a run, which trains
with recipes/pretrain_gpt.py or counts with recipes/evidence/_count.py, recipes/evidence/_show.py
for figures and recipes/evidence/_verdict.py for what they say, on what recipes/evidence/corpus.py
makes with recipes/prepare_data.py.
"""

import argparse
import fcntl
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _model import SIZES, Size, Variant, shrunk
from _run import ROOT, CutError, Place, RunError, run
from _show import draw_losses, figure, losses_table, of, save
from _verdict import Check, Results, verdict

from ep_plugin.errors import ConfigError
from ep_plugin.written import write_whole

EXAMPLES = """examples:
  python recipes/evidence/{script} --list
  python recipes/evidence/{script}                                    CPU size, minutes
  python recipes/evidence/{script} --size gpu --jobs 7 --minutes 9    on one GPU, resumable
  python recipes/evidence/{script} --size gpu-20m --jobs 7            a fifth of the tokens
  python recipes/evidence/{script} --size gpu --shrink                the same, tiny, on the CPU
  python recipes/evidence/{script} --size gpu --show                  table and plot of what is kept
"""
SHORTEST = 15.0  # seconds that must be left for a run to start


@dataclass(frozen=True)
class Claim:
    """What is claimed, the runs that show it, and how they are shown."""

    letter: str
    name: str  # of the script and the plot
    about: str  # the section's heading
    says: str  # what is claimed
    variants: tuple[Variant, ...]
    labels: dict[str, str]  # of the variants' names, in the table's order
    checks: tuple[Check, ...]  # what is compared to see whether the claim holds
    table: Callable[[Results], str]
    plot: Callable[[Results, Path], None]

    def shown(self, results: Results) -> str:
        """Return the table, what is not in it, and whether it supports the claim."""
        absent = [label for name, label in self.labels.items() if not of(results, name)]
        missing = f"Not run: {', '.join(absent)}.\n\n" if absent else ""
        return f"{self.table(results)}\n{missing}{verdict(self.checks, results, self.labels)}"


def of_losses(
    letter: str,
    name: str,
    about: str,
    says: str,
    variants: tuple[Variant, ...],
    labels: dict[str, str],
    checks: tuple[Check, ...],
) -> Claim:
    """Return a claim about losses alone: one row and one curve for each label."""

    def table(results: Results) -> str:
        return losses_table(results, labels)

    def plot(results: Results, path: Path) -> None:
        made, axes = figure(1)
        draw_losses(axes[0], results, labels)
        axes[0].set_title(about, fontsize=9)
        save(made, results, path)

    return Claim(letter, name, about, says, variants, labels, checks, table, plot)


def main(claims: Iterable[Claim], script: str, argv: list[str] | None = None) -> int:
    """Run the claims' variants and show them; 1 when some are left, 2 for mistakes."""
    claims = tuple(claims)
    args = _parser(claims, script).parse_args(argv)
    try:
        return _main(claims, args)
    except ConfigError as error:
        print(f"{script}: error: {error}", file=sys.stderr)
        return 2


def _parser(claims: tuple[Claim, ...], script: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="\n".join(
            f"({claim.letter}) {claim.about}. Claim: {claim.says}" for claim in claims
        ),
        usage=f"{script} [LETTER ...] [options]" if script == "several.py" else None,
        epilog=EXAMPLES.format(script=script),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", choices=SIZES, default="cpu", help="of models and runs (cpu)")
    parser.add_argument("--shrink", action="store_true", help="seconds on the CPU, kept nowhere")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="a run for each (1)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these variants")
    parser.add_argument("--list", action="store_true", help="say what there is and what is left")
    parser.add_argument("--show", action="store_true", help="run nothing: table and plot")
    parser.add_argument("--minutes", type=float, help="end before; the same command goes on")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once; above 1 no times (1)")
    parser.add_argument("--data", type=Path, help="the corpus (data/evidence, GPU: -large)")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/evidence", help="logs")
    parser.add_argument("--results", type=Path, help="benchmarks/results/evidence_SIZE.json")
    parser.add_argument("--plots", type=Path, help="folder (benchmarks/evidence)")
    return parser


def _main(claims: tuple[Claim, ...], args: argparse.Namespace) -> int:
    size = shrunk(SIZES[args.size]) if args.shrink else SIZES[args.size]
    kept = args.runs / size.name if args.shrink else ROOT / "benchmarks" / "results"
    file = args.results or kept / f"evidence_{size.file_name}.json"
    plots = args.plots or (kept if args.shrink else ROOT / "benchmarks" / "evidence")
    variants = _chosen(claims, args.only, size)
    args.data = args.data or ROOT / "data" / size.corpus
    results = read(file)
    todo = left(variants, args.seeds, size, results, args.runs / size.name)
    if args.list:
        for variant in variants:
            state = "left" if variant in (v for v, _ in todo) else "there"
            print(f"{variant.name:20} {state:6} {' '.join(variant.extra(size))}")
        return 0
    if not args.show:
        _check(size, args)
        place = Place(args.runs / size.name, args.data, args.jobs)
        todo = sweep(todo, size, place, args.minutes, file)
    show(claims, read(file), size, plots)
    if todo:
        print("left: " + " ".join(f"{variant.name}-seed{seed}" for variant, seed in todo))
    return 1 if todo and not args.show else 0


def _chosen(claims: tuple[Claim, ...], only: list[str] | None, size: Size) -> list[Variant]:
    every = [variant for claim in claims for variant in claim.variants]
    found = {v.name: v for v in every if not (v.ranks and size.on_gpu)}
    unknown = [name for name in only or [] if name not in found]
    if unknown:
        raise ConfigError(f"--only must be of {' '.join(found)}; got {unknown[0]}")
    wanted = set(only or found)
    for _ in range(2):  # a student's source has its own
        wanted |= {need for name in wanted for need in found[name].needs}
    return [variant for variant in found.values() if variant.name in wanted]


def _check(size: Size, args: argparse.Namespace) -> None:
    import torch

    if size.on_gpu and not torch.cuda.is_available():
        raise ConfigError(
            "--size gpu needs a GPU, and torch sees none; use --size cpu, or --size gpu --shrink"
        )
    if not (args.data / "manifest.json").is_file():
        raise ConfigError(
            f"--data must hold the corpus; {str(args.data)!r} does not; run "
            "python recipes/evidence/corpus.py"
        )
    if args.jobs < 1:
        raise ConfigError(f"--jobs must be at least 1; got {args.jobs}; use --jobs 1")


def read(file: Path) -> Results:
    """Return the results that are kept; none where there is no file."""
    found: Results = json.loads(file.read_text()) if file.is_file() else {}
    return found


def left(
    variants: list[Variant], seeds: list[int], size: Size, results: Results, runs: Path
) -> list[tuple[Variant, int]]:
    """Return what is to be run, those that others start from first.

    Raises ConfigError for a kept result of other flags or another size.
    """
    todo = []
    for seed in seeds:
        for variant in sorted(variants, key=lambda v: bool(v.needs)):
            before = results.get(f"{variant.name}-seed{seed}")
            described = json.loads(json.dumps(variant.described(size)))
            if before is None:
                todo.append((variant, seed))
            elif {key: before.get(key) for key in described} != described:
                raise ConfigError(
                    f"{variant.name} is kept with other settings than it has now; take its entry "
                    "out of the results, or use --results ANOTHER_FILE"
                )
        waiting = {need for v, s in todo if s == seed for need in v.needs}
        missing = [
            (v, seed)
            for v in variants
            if v.name in waiting
            and (v, seed) not in todo
            and not (runs / f"{v.name}-seed{seed}" / "checkpoint").is_dir()
        ]
        todo = missing + todo
    return todo


def sweep(
    todo: list[tuple[Variant, int]], size: Size, place: Place, minutes: float | None, file: Path
) -> list[tuple[Variant, int]]:
    """Run what is to be run, keep each result as soon as it is there, and return what is left."""
    deadline = time.monotonic() + 60 * minutes if minutes else float("inf")
    running: dict[str, Future[bool]] = {}

    def one(variant: Variant, seed: int) -> bool:
        before = [running.get(f"{need}-seed{seed}") for need in variant.needs]
        if not all(parent is None or parent.result() for parent in before):
            return False
        key = f"{variant.name}-seed{seed}"
        if time.monotonic() + SHORTEST > deadline:
            return False
        try:
            result = run(variant, seed, size, place, deadline)
        except (RunError, CutError) as error:
            print(f"{key}: {error}", flush=True)
            return False
        keep(file, key, result)
        loss = f"held-out loss {result['heldout'][-1][1]:.4f}, " if result["heldout"] else ""
        step = f"{1000 * result['step_seconds']:.1f} ms a step"
        print(f"{key}: {loss}{step}, {result['wall_seconds']:.0f} s in all", flush=True)
        return True

    with ThreadPoolExecutor(max_workers=place.jobs) as pool:
        for variant, seed in todo:
            running[f"{variant.name}-seed{seed}"] = pool.submit(one, variant, seed)
    return [(v, s) for v, s in todo if not running[f"{v.name}-seed{s}"].result()]


def keep(file: Path, key: str, result: dict[str, Any]) -> None:
    """Add a result to the file, also where two sweeps write it at once."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(file.parent, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        results = dict(sorted({**read(file), key: result}.items()))
        lines = ",\n".join(f" {json.dumps(k)}: {json.dumps(v)}" for k, v in results.items())
        write_whole(file, f"{{\n{lines}\n}}\n")
    finally:
        os.close(lock)


def show(claims: tuple[Claim, ...], results: Results, size: Size, plots: Path) -> None:
    """Print the table of each claim and draw its plot, of what is there."""
    for claim in claims:
        names = {variant.name for variant in claim.variants}
        own = {key: value for key, value in results.items() if value["name"] in names}
        if not own:
            print(f"({claim.letter}) {claim.about}: no result yet.")
            continue
        print(f"({claim.letter}) {claim.about}\n\nClaim: {claim.says}\n\n{claim.shown(own)}")
        if len(own) < 2:
            continue
        plots.mkdir(parents=True, exist_ok=True)
        path = plots / f"{claim.name}_{size.file_name}.png"
        claim.plot(own, path)
        print(f"plot: {path}")
