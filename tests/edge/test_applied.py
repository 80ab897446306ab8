"""The edited script and `-m ep_plugin.run` of the unedited one are the same run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from loop import MODEL, MOE, OURS, ROOT, SCRIPT

from ep_plugin.cli import main
from ep_plugin.commands.report.events import Run, read_run

pytestmark = [pytest.mark.megatron, pytest.mark.newest]  # the recipe is its own
FLAGS = ("--train-iters", "3", *MOE, "--expert-model-parallel-size", "2")


def run(folder: Path, path: str, *script: str) -> Run:
    """Run a script on two ranks, with `path` on Python's; return its TensorBoard scalars."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", *script, *MODEL, *FLAGS),
            *("--tensorboard-dir", str(folder)),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.count("hosts Megatron's MoE layers") == 1
    return read_run(folder)


def check_both_ways(script: Path, path: str, tmp_path: Path) -> None:
    """Run the script as it is, and a copy that `ep-plugin apply` has edited."""
    edited = tmp_path / "pretrain.py"
    edited.write_bytes(script.read_bytes())
    assert main(["apply", str(edited)]) == 0
    applied = run(tmp_path / "applied", path, str(edited))
    expected = run(tmp_path / "run", path, *OURS, str(script))
    for tag in ("lm loss", "load_balancing_loss", "grad-norm"):
        series = applied.series(tag)
        assert len(series) == 3
        assert series == expected.series(tag)


def test_the_applied_script_trains_as_run_does(tmp_path: Path) -> None:
    check_both_ways(Path(SCRIPT), str(ROOT), tmp_path)


def test_megatron_lm_s_own_script_trains_both_ways(tmp_path: Path) -> None:
    """Of any supported release; its dataset helpers must have been made."""
    checkout = os.environ.get("EP_MEGATRON_LM")
    if checkout is None:
        pytest.skip("EP_MEGATRON_LM names no Megatron-LM checkout to run pretrain_gpt.py of")
    path = os.pathsep.join([checkout, str(ROOT), *os.environ.get("PYTHONPATH", "").split(":")])
    check_both_ways(Path(checkout, "pretrain_gpt.py"), path, tmp_path)
