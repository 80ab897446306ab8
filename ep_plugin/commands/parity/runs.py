"""The runs that are compared: one rank, then each layout, and what each resumes."""

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ep_plugin.commands.parity.differences import (
    Comparison,
    compare_gradients,
    compare_scalars,
    read_scalars,
)
from ep_plugin.commands.parity.launch import Launcher, RunFailed
from ep_plugin.commands.parity.layouts import ONE_RANK, Layout

GRADIENTS = 10  # a gradient's tolerance over a loss's


def compare(
    args: argparse.Namespace, layouts: list[Layout], arguments: list[str]
) -> list[Comparison]:
    """Run `arguments` on one rank and at each layout; raises RunFailed when one rank does not."""
    every = [ONE_RANK, *layouts]
    device = _device(args.device, max(layout.parallel.world_size for layout in every))
    num_runs = len(every) + (len(layouts) if args.resume else 0)
    with (
        tempfile.TemporaryDirectory(prefix="ep-parity-") as folder,
        tqdm(total=num_runs, desc="parity", unit="run") as bar,
    ):
        launcher = Launcher(args.script, arguments, Path(folder), device)
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
