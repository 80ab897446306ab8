"""Megatron's training loop of older releases; `test_older_releases.py` runs this file on each."""

import shlex
from pathlib import Path

import pytest
from loop import NEWEST, OURS, train

pytestmark = [
    pytest.mark.megatron,
    pytest.mark.skipif(NEWEST, reason="an older release: here `test_parity.py` compares layouts"),
]
MODEL = shlex.split(
    """
    --num-attention-heads 4 --normalization RMSNorm --num-experts 8 --moe-ffn-hidden-size 32
    --moe-router-topk 2 --moe-aux-loss-coeff 1e-2 --moe-token-dispatcher-type alltoall
    --train-iters 4 --vocab-size 63
    """
)


def test_two_ranks_train_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EP_TEST_SAME_WEIGHTS", "1")
    split = ("--expert-model-parallel-size", "2", "--ep-overlap", "chunked")
    one = train(1, OURS, tmp_path / "one", *MODEL)
    two = train(2, OURS, tmp_path / "two", *MODEL, *split, "--use-distributed-optimizer")
    for tag in ("lm loss", "load_balancing_loss", "grad-norm"):
        values = [value for _, value in one.series(tag)]
        assert len(values) == 4
        assert [value for _, value in two.series(tag)] == pytest.approx(values, rel=1e-5)
    assert two.shares() == one.shares()
    assert sorted(two.shares()[1]) == list(range(8))
