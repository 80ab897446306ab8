"""Running the user's script at a layout, in processes of its own."""

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ep_plugin.commands.parity.layouts import Layout
from ep_plugin.errors import ConfigError

ERROR = re.compile(r"ep_plugin(?:\.run)?: error: ")  # how a refused run begins its one sentence
AGENT = "torch/distributed/elastic/multiprocessing/api.py"
TAIL = 30  # lines of a failed run that are shown


class RunFailed(Exception):
    """The script did not finish at a layout."""


@dataclass(frozen=True)
class Launcher:
    """How runs are started: the script, its flags, the folder for results, and where."""

    script: str
    arguments: Sequence[str]
    folder: Path
    device: str  # cpu or cuda

    def run(self, layout: Layout, name: str, *flags: str) -> Path:
        """Run at `layout` and return the folder its results are in.

        Raises ConfigError when the run refuses its flags, RunFailed when it does not finish.
        """
        results = self.folder / name
        done = subprocess.run(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
                *("--nproc-per-node", str(layout.parallel.world_size)),
                *("-m", "ep_plugin.run", self.script, *self.arguments, *layout.arguments()),
                *("--ep-parity-dump", str(results), *flags),
            ],
            env=self._environment(),
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        if done.returncode == 0 and results.is_dir():
            return results
        if done.returncode == 0:
            raise RunFailed(
                f"{layout.name}: {self.script} ended without a step of Megatron's training loop; "
                "use a script that calls pretrain()"
            )
        lines = done.stderr.splitlines()
        refused = next((line for line in lines if ERROR.match(line)), None)
        if refused is not None:
            raise ConfigError(f"{layout.name}: {ERROR.sub('', refused, count=1)}")
        ends = (i for i, line in enumerate(lines) if AGENT in line)  # torchrun's own report
        shown = "\n".join(lines[: next(ends, None)][-TAIL:])
        raise RunFailed(f"{layout.name}: {self.script} did not finish; it ended with\n{shown}")

    def _environment(self) -> dict[str, str]:
        defaults = {"OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
        return {**defaults, **os.environ, "EP_PLUGIN_DEVICE": self.device}
