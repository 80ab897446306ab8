"""A user's own router, dispatcher and grouped GEMM in Megatron's loop, named by flags alone."""

import shlex
from pathlib import Path

import pytest
from counted_run import METHODS
from loop import OURS, ROOT, launch

from ep_plugin.commands.report.events import read_run

pytestmark = [pytest.mark.megatron, pytest.mark.newest]
COUNTED = (str(ROOT / "tests" / "helpers" / "counted_run.py"),)
MODEL = shlex.split(
    """
    --num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 48 --moe-router-pre-softmax
    --moe-router-load-balancing-type none --moe-token-dispatcher-type alltoall
    --expert-model-parallel-size 2 --train-iters 2
    """
)
OWN = shlex.split(
    "--ep-router my_moe.router --ep-dispatcher my_moe.dispatcher --ep-gemm my_moe.gemm"
)


def losses(folder: Path, runner: tuple[str, ...], *flags: str) -> tuple[list[float], str]:
    """Return the loss of both iterations, and what the run printed."""
    done = launch(2, runner, *MODEL, *flags, "--tensorboard-dir", str(folder))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    values = [value for _, value in read_run(folder).series("lm loss")]
    assert len(values) == 2
    return values, done.stdout


def test_own_options_train_as_ours_do(tmp_path: Path) -> None:
    expected, _ = losses(tmp_path / "ours", OURS)
    found, printed = losses(tmp_path / "own", COUNTED, *OWN)
    called = sorted(f"{owner.__name__}.{name}" for owner, name in METHODS)
    assert f"called: {' '.join(called)}\n" in printed
    assert found == pytest.approx(expected, rel=1e-5)
