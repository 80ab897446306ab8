"""Per-rank files (`--ckpt-format torch`) against the torch_dist checkpoint of the same run."""

from pathlib import Path

import pytest
import torch
from loop import MOE, STOCK, launch

from ep_plugin.cli import main
from ep_plugin.convert.formats import megatron_dist

pytestmark = pytest.mark.megatron
pytest.importorskip("megatron.training", reason="needs megatron-core with megatron.training")

FLAGS = (
    *("--normalization", "RMSNorm", "--group-query-attention", "--num-query-groups", "2"),
    *("--num-attention-heads", "4", *MOE, "--tensor-model-parallel-size", "2"),
    "--sequence-parallel",
)


def test_the_same_tensors_and_objects(tmp_path: Path) -> None:
    """Both of Megatron's formats after one step of the same run: every value to the bit.

    Megatron's own experts, cut over two ranks as everything else is.
    """
    for name in ("torch", "torch_dist"):
        save = ("--save", str(tmp_path / name), "--save-interval", "1", "--train-iters", "1")
        done = launch(2, STOCK, *save, *FLAGS, "--ckpt-format", name)
        assert done.returncode == 0, done.stderr[-3000:]
    source, target = str(tmp_path / "torch"), str(tmp_path / "converted")
    assert main(["convert", "--from", source, "--to", target]) == 0
    ours = megatron_dist.open_checkpoint(tmp_path / "converted")
    theirs = megatron_dist.open_checkpoint(tmp_path / "torch_dist")
    names = {name for name in theirs.tensors if not name.startswith(("optimizer", "chained"))}
    assert set(ours.tensors) == names
    for name in names:
        assert torch.equal(ours.read_tensor(name), theirs.read_tensor(name)), name
    assert ours.objects == {name for name in theirs.objects if "_extra_state" in name}
    assert ours.folder.name == theirs.folder.name == "iter_0000001"
    assert ours.common["iteration"] == theirs.common["iteration"] == 1
