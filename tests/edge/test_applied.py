"""The edited script and `-m ep_plugin.run` of the unedited one are the same run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from loop import MODEL, MOE, OURS, ROOT, SCRIPT, train

from ep_plugin.cli import main
from ep_plugin.report.events import read_run

pytestmark = pytest.mark.megatron


def test_the_applied_script_trains_as_run_does(tmp_path: Path) -> None:
    script, logs = tmp_path / "pretrain.py", tmp_path / "applied"
    script.write_bytes(Path(SCRIPT).read_bytes())
    assert main(["apply", str(script)]) == 0
    flags = ("--train-iters", "3", *MOE, "--expert-model-parallel-size", "2")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", str(script), *MODEL, *flags),
            *("--tensorboard-dir", str(logs)),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.count("hosts Megatron's MoE layers") == 1
    expected = train(2, OURS, tmp_path / "run", *flags)
    for tag in ("lm loss", "load_balancing_loss", "grad-norm"):
        series = read_run(logs).series(tag)
        assert len(series) == 3
        assert series == expected.series(tag)
