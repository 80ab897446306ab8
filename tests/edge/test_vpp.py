"""Virtual pipeline stages: from the same weights the script trains as it does with whole stages."""

from pathlib import Path

import pytest
from loop import OURS, train

from ep_plugin.commands.report.events import TRAIN
from ep_plugin.megatron.cpu import mode as cpu_mode

pytestmark = [
    pytest.mark.megatron,
    pytest.mark.skipif(
        not cpu_mode.wanted(), reason="a GPU is here and EP_PLUGIN_DEVICE is not cpu"
    ),
]

PIPELINE = ("--num-layers", "4", "--pipeline-model-parallel-size", "2", "--train-iters", "3")
VIRTUAL = (*PIPELINE, "--num-layers-per-virtual-pipeline-stage", "1")


def test_virtual_stages_train_as_whole_stages(tmp_path: Path) -> None:
    # Each rank draws its own layers' weights, so that equal weights come from a checkpoint.
    saved = str(tmp_path / "saved")
    whole = train(2, OURS, tmp_path / "whole", *PIPELINE, "--save", saved, "--save-interval", "1")
    virtual = train(2, OURS, tmp_path / "virtual", *VIRTUAL, "--load", saved, "--ckpt-step", "1")
    for tag in (TRAIN, "grad-norm"):
        expected = dict(whole.scalars[tag][1:])
        assert list(expected) == [2, 3]
        assert dict(virtual.scalars[tag]) == pytest.approx(expected, rel=1e-6)
