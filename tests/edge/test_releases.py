"""Megatron's training loop of older releases: flags, checks, logs and training as on the newest."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from core_model import Case
from layouts import CASES, CHECKS
from loop import RUN
from releases import OLDER_WITH_LOOP, RELEASES, ROOT, environment
from support_matrix import FILE, MARKS, README, table

from ep_plugin.megatron import cpu
from ep_plugin.report.events import Run, read_run

pytestmark = pytest.mark.megatron
SCRIPT = str(ROOT / "tests" / "edge" / "pretrain_older.py")
MODEL = shlex.split(
    """
    --num-layers 2 --hidden-size 32 --ffn-hidden-size 48 --num-attention-heads 4 --seq-length 16
    --max-position-embeddings 16 --position-embedding-type rope --swiglu --disable-bias-linear
    --normalization RMSNorm --untie-embeddings-and-output-weights --num-experts 8
    --moe-ffn-hidden-size 32 --moe-router-topk 2 --moe-aux-loss-coeff 1e-2
    --moe-token-dispatcher-type alltoall --train-iters 4
    """
)


def train(version: str, ranks: int, folder: Path, *flags: str) -> Run:
    """Run the release's loop with the plugin and return its TensorBoard scalars."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    given = [*RUN, *MODEL, *flags, "--micro-batch-size", "1", "--vocab-size", "63"]
    given += ["--tensorboard-dir", str(folder)]
    done = subprocess.run(
        [sys.executable, *command, "-m", "ep_plugin.run", SCRIPT, *given],
        env=environment(version) | {"EP_TEST_SAME_WEIGHTS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "hosts Megatron's MoE layers" in done.stdout
    return read_run(folder)


@pytest.mark.skipif(not cpu.wanted(), reason="a GPU is here and EP_PLUGIN_DEVICE is not cpu")
def test_megatron_s_loop_trains_on_two_ranks_as_on_one(tmp_path: Path) -> None:
    split = ("--expert-model-parallel-size", "2", "--ep-overlap", "chunked")
    for version in OLDER_WITH_LOOP:  # whose mock data differ
        one = train(version, 1, tmp_path / f"{version} one")
        two = train(version, 2, tmp_path / version, *split, "--use-distributed-optimizer")
        for tag in ("lm loss", "load_balancing_loss", "grad-norm"):
            values = [value for _, value in one.series(tag)]
            assert len(values) == 4
            assert [value for _, value in two.series(tag)] == pytest.approx(values, rel=1e-5)
        assert two.shares() == one.shares()
        assert sorted(two.shares()[1]) == list(range(8))


def test_the_readme_s_matrix_is_what_was_measured() -> None:
    kept = json.loads(FILE.read_text())
    assert MARKS[0] + table(kept) + MARKS[1] in README.read_text()
    assert list(kept) == list(RELEASES)
    for version in RELEASES:
        assert list(kept[version]["layouts"]) == [case.name for case in CASES]
        assert list(kept[version]["checks"]) == list(CHECKS)
        for entries in (kept[version]["layouts"], kept[version]["checks"]):
            assert all(entry["passed"] for entry in entries.values())


def test_a_case_says_what_it_is() -> None:
    """Names are what the matrix shows: no two layouts are the same one."""
    cases: list[Case] = list(CASES)
    assert len({case.name for case in cases}) == len(set(cases)) == len(cases) >= 12
    assert all(case.world <= 8 for case in cases)
