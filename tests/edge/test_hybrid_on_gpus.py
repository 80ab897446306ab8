"""Megatron's unmodified pretrain_hybrid.py on two GPUs, with its own block and with ours."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from loop import OURS, ROOT, STOCK
from releases import CHECKOUT

from ep_plugin.commands.report.events import TRAIN, read_run

KEPT = json.loads((ROOT / "benchmarks" / "results" / "hybrid_h200.json").read_text())
RUNS = KEPT["runs"]


def train(runner: tuple[str, ...], folder: Path, *flags: str) -> list[float]:
    """Return the losses of the script's run with the kept flags."""
    script = Path(os.environ[CHECKOUT]) / "pretrain_hybrid.py"
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launch, *runner, str(script), *shlex.split(KEPT["flags"]), *flags]
    done = subprocess.run(
        [*command, "--tensorboard-dir", str(folder)],
        env={**os.environ, "NVIDIA_TF32_OVERRIDE": "0"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return [loss for _, loss in read_run(folder).series(TRAIN)]


def apart(ours: list[float], theirs: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.multi_gpu
@pytest.mark.megatron
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
@pytest.mark.skipif(CHECKOUT not in os.environ, reason=f"{CHECKOUT} names no checkout")
def test_losses_are_those_of_megatron_s_block_to_rounding(tmp_path: Path) -> None:
    pytest.importorskip("transformer_engine")
    flags = "--hybrid-layer-pattern", RUNS["ours_fp32"]["pattern"]
    ours, theirs = (
        train(runner, tmp_path / str(number), *flags) for number, runner in enumerate((OURS, STOCK))
    )
    assert 0 < apart(ours, theirs) < 1e-5  # to the digit it would be Megatron's own block


def test_the_page_has_the_losses_that_are_kept() -> None:
    page = (ROOT / "docs" / "hybrid.md").read_text()
    table = page.partition("<!-- on gpus -->\n")[2].partition("<!-- /on gpus -->")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]
    ]
    pairs = [
        ("ours_fp32", "stock_fp32"),
        ("ours_bf16", "stock_bf16"),
        ("ours_bf16_graph", "ours_bf16"),
        ("G_ours", "G_stock"),
        ("M_ours", "M_stock"),
    ]
    for (pattern, _, first, furthest), (name, other) in zip(rows, pairs, strict=True):
        ours, theirs = RUNS[name]["losses"], RUNS[other]["losses"]
        assert pattern == f"`{RUNS[name]['pattern']}`"
        assert first == f"{ours[0]}, {theirs[0]}"
        assert furthest == f"{apart(ours, theirs):.1e}"
    for package in ("flash-linear-attention", "mamba-ssm"):
        assert f"{package} {KEPT['versions'][package]}" in table
