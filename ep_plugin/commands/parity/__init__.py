"""`ep-plugin parity`: do these layouts compute what one rank computes? On the user's own script.

`layouts.py` reads them, `comparable.py` makes their runs comparable, `tiny.py` small, `launch.py`
runs them, `differences.py` reads what they left (`ep_plugin/megatron/workers/layout_run.py`).
"""

import argparse
import json
import shlex
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ep_plugin.commands.parity.comparable import Arguments, comparable, expand_preset
from ep_plugin.commands.parity.differences import (
    Comparison,
    compare_gradients,
    compare_scalars,
    read_scalars,
)
from ep_plugin.commands.parity.launch import Launcher, RunFailed
from ep_plugin.commands.parity.layouts import ONE_RANK, Layout, parse
from ep_plugin.commands.parity.tiny import shrink
from ep_plugin.errors import ConfigError

GRADIENTS = 10  # a gradient's tolerance over a loss's
EXAMPLES = r"""examples:
  ep-plugin parity pretrain_gpt.py "${ARGS[@]}" --tiny --layouts ep=2 tp=2,ep=2 pp=2,ep=2
  ep-plugin parity pretrain_gpt.py "${ARGS[@]}" --tiny --resume --layouts ep=4 tp=2,ep=2,etp=1 \
      --output parity.json

ARGS are those of your own run. Each layout runs a few iterations from one rank's weights, on the
same batches, in fp32 and without dropout; what that changes in ARGS is printed. A layout takes as
few ranks as it can; dp=N gives it more. Where there are GPUs enough they are used, else the CPU.
Exit code 1: a layout differs, or did not run; 2: a setting is wrong.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("script", metavar="SCRIPT", help="your pretrain script")
    parser.add_argument(
        "arguments", nargs=argparse.REMAINDER, metavar="ARGS",
        help="the flags of SCRIPT, then those of this command",
    )  # fmt: skip
    add_flags(parser)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that also stand behind those of the script."""
    parser.add_argument(
        "--layouts", nargs="+", metavar="LAYOUT", help="such as ep=2 tp=2,ep=2 pp=2,ep=2,dp=4"
    )
    parser.add_argument("--tiny", action="store_true", help="shrink the model, on random data")
    parser.add_argument(
        "--iterations",
        type=int,
        default=3,
        metavar="N",
        help="iterations of each run (default: %(default)s)",
    )
    parser.add_argument(
        "--resume", action="store_true",
        help="save after N iterations and run N more; each layout also resumes what the one before "
        "it saved, and must go on as one rank does",
    )  # fmt: skip
    parser.add_argument(
        "--tolerance", type=float, default=1e-5, metavar="D",
        help="largest relative difference of a loss or norm; ten times that of a gradient "
        "(default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where to run; auto: GPUs where there are enough, else the CPU (default: auto)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the JSON object here")


def run(args: argparse.Namespace) -> int:
    """Compare. Returns 0, or 1 when a layout differs; raises ConfigError for a user's mistake."""
    theirs = _read_own(args)
    if not Path(args.script).is_file():
        raise ConfigError(
            f"SCRIPT must be a Python file; got {args.script!r}, which is not here; use the path "
            "of your pretrain script"
        )
    layouts = _layouts(args)
    edits = [comparable(expand_preset(theirs), args.iterations * (2 if args.resume else 1))]
    if args.tiny:
        edits.append(shrink(edits[0].all, [ONE_RANK, *layouts]))
    if not args.json:
        _print_edits(args, edits)
    try:
        comparisons = _compare(args, layouts, edits[-1])
    except RunFailed as error:
        print(f"ep-plugin parity: {error}", file=sys.stderr)
        return 1
    passed = all(comparison.passed for comparison in comparisons)
    report = {
        "passed": passed,
        "script": args.script,
        "arguments": edits[-1].all,
        "removed": [word for edit in edits for word in edit.removed],
        "layouts": [comparison.as_dict() for comparison in comparisons],
    }
    if args.output is not None:
        args.output.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report) if args.json else _table(comparisons))
    return 0 if passed else 1


def _read_own(args: argparse.Namespace) -> list[str]:
    """Take this command's flags from behind the script's into `args`; return the script's."""
    own = argparse.ArgumentParser("ep-plugin parity", allow_abbrev=False, add_help=False)
    add_flags(own)
    _, theirs = own.parse_known_args(args.arguments, namespace=args)
    return theirs


def _layouts(args: argparse.Namespace) -> list[Layout]:
    if not args.layouts:
        raise ConfigError("--layouts is needed; use --layouts ep=2")
    if args.iterations < (least := 2 if args.resume else 1):
        raise ConfigError(
            f"--iterations must be at least {least}; got {args.iterations}; use "
            f"--iterations {least}"
        )
    if not args.tolerance > 0:
        raise ConfigError(
            f"--tolerance must be above 0; got {args.tolerance}; use --tolerance 1e-5"
        )
    for text, times in Counter(args.layouts).items():
        if times > 1:
            raise ConfigError(f"--layouts has {text} {times} times; use it once")
    return [parse(text) for text in args.layouts]


def _compare(
    args: argparse.Namespace, layouts: list[Layout], arguments: Arguments
) -> list[Comparison]:
    every = [ONE_RANK, *layouts]
    device = _device(args.device, max(layout.parallel.world_size for layout in every))
    num_runs = len(every) + (len(layouts) if args.resume else 0)
    with (
        tempfile.TemporaryDirectory(prefix="ep-parity-") as folder,
        tqdm(total=num_runs, desc="parity", unit="run") as bar,
    ):
        launcher = Launcher(args.script, arguments.all, Path(folder), device)
        runs = _Runs(args, launcher, Path(folder), bar)
        one, save = runs.fresh(ONE_RANK, 0)
        expected, comparisons = read_scalars(one), []
        for number, layout in enumerate(layouts, start=1):
            tolerance = args.tolerance
            comparison = Comparison(
                layout.name, layout.parallel.world_size, tolerance, GRADIENTS * tolerance
            )
            comparisons.append(comparison)
            try:
                other, saved = runs.fresh(layout, number)
                comparison.scalars = compare_scalars(expected, read_scalars(other))
                comparison.gradients = compare_gradients(one, other)
                if args.resume:
                    resumed = runs.resumed(layout, number, save)
                    comparison.resumed = compare_scalars(expected, read_scalars(resumed))
                    save = saved
            except RunFailed as error:  # the other layouts can still be looked at
                comparison.failure = str(error)
    return comparisons


@dataclass(frozen=True)
class _Runs:
    """Starts runs, and shows that they are under way."""

    args: argparse.Namespace
    launcher: Launcher
    folder: Path
    bar: Any  # tqdm

    def fresh(self, layout: Layout, number: int) -> tuple[Path, Path]:
        """Return where a run's results are, and what it saved where runs shall be resumed."""
        save = self.folder / f"save{number}"
        saving = ("--save", str(save), "--save-interval", str(self.args.iterations))
        results = self._run(layout, f"run{number}", *(saving if self.args.resume else ()))
        return results, save

    def resumed(self, layout: Layout, number: int, save: Path) -> Path:
        """Return where the results are of a run that goes on from `save`."""
        loading = ("--load", str(save), "--ckpt-step", str(self.args.iterations))
        return self._run(layout, f"resumed{number}", *loading)

    def _run(self, layout: Layout, name: str, *flags: str) -> Path:
        self.bar.set_postfix_str(layout.name)
        results = self.launcher.run(layout, name, *flags)
        self.bar.update()
        return results


def _device(wanted: str, ranks: int) -> str:
    if wanted != "auto":
        return wanted
    import torch

    return "cuda" if torch.cuda.device_count() >= ranks else "cpu"


def _print_edits(args: argparse.Namespace, edits: list[Arguments]) -> None:
    removed = [word for edit in edits for word in edit.removed]
    added = [word for edit in edits for word in edit.added]
    print(f"{args.script}, in fp32 and deterministic{', tiny' if args.tiny else ''}")
    print(f"  without: {shlex.join(removed) or '-'}")
    print(f"  with:    {shlex.join(added)}", flush=True)


def _table(comparisons: list[Comparison]) -> str:
    """Return a row for each layout: its largest differences, and the first that is too large."""
    kinds: dict[str, Any] = {}
    for comparison in comparisons:
        row = {"layout": comparison.layout, "ranks": str(comparison.ranks)}
        for difference in comparison.scalars:
            row[difference.name] = _larger(row.get(difference.name), difference.relative)
        for title, differences in (
            ("gradients", comparison.gradients),
            ("resumed", comparison.resumed),
        ):
            for difference in differences:
                row[title] = _larger(row.get(title), difference.relative)
        row[""] = "passed" if comparison.passed else "DIFFERS"
        if comparison.failure is not None:
            row[""] = "DID NOT FINISH"
        kinds[comparison.layout] = row
    head = list(dict.fromkeys(title for row in kinds.values() for title in row if title))
    rows = [
        [*head, ""],
        *([row.get(title, "-") for title in [*head, ""]] for row in kinds.values()),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head) + 1)]
    lines = ["largest relative differences from one rank:"]
    lines += [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    lines += [
        f"{comparison.layout}: the first that differs is {comparison.first.text}"
        for comparison in comparisons
        if comparison.first is not None
    ]
    lines += [comparison.failure for comparison in comparisons if comparison.failure is not None]
    return "\n".join(lines)


def _larger(shown: str | None, relative: float) -> str:
    largest = relative if shown is None else max(float(shown), relative)
    return f"{largest:.1e}"
