"""A run goes on at another layout as if never interrupted, or is refused in one sentence."""

import argparse
import re
from pathlib import Path

import pytest
from loop import MOE, OURS, launch
from stored import healthy, write

from ep_plugin.commands.report.events import read_run
from ep_plugin.errors import ConfigError
from ep_plugin.megatron.arguments.resume import check_resumable
from ep_plugin.megatron.seams.chained import dealt

pytestmark = pytest.mark.megatron


def test_experts_on_two_ranks_go_on_on_one(tmp_path: Path) -> None:
    """The optimizer's two parts become one; other layouts are resumed in test_parity.py."""
    saved, run = str(tmp_path / "saved"), ("--train-iters", "4", *MOE)
    flags = (*run, "--use-distributed-optimizer", "--save-interval", "2")
    two = ("--expert-model-parallel-size", "2", "--save", saved)
    folders = [str(tmp_path / name) for name in ("whole", "resumed")]
    done = launch(2, OURS, *flags, *two, "--tensorboard-dir", folders[0])
    assert done.returncode == 0, done.stderr[-3000:]
    assert "optimizer state is saved by parameter" in done.stdout
    one = ("--load", saved, "--ckpt-step", "2", "--tensorboard-dir", folders[1])
    done = launch(1, OURS, *flags, *one)
    assert done.returncode == 0, done.stderr[-3000:]
    whole, resumed = (read_run(Path(folder)) for folder in folders)
    for tag in ("grad-norm", "lm loss validation"):
        expected = [(i, v) for i, v in whole.series(tag) if i > 2]
        assert expected
        assert [i for i, _ in resumed.series(tag)] == [i for i, _ in expected]
        values = [v for _, v in resumed.series(tag)]
        assert values == pytest.approx([v for _, v in expected], rel=1e-6)


def sizes(ep: int, etp: int | None = None) -> dict[str, int | None]:
    return {
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 1,
        "expert_model_parallel_size": ep,
        "expert_tensor_parallel_size": etp,
    }


def test_state_by_buckets_is_refused_at_another_layout(tmp_path: Path) -> None:
    content = healthy()
    content.common["content_metadata"] = {"distrib_optim_sharding_type": "dp_reshardable"}
    vars(content.common["args"]).update(sizes(ep=4, etp=1))
    wanted = argparse.Namespace(
        num_experts=4,
        use_distributed_optimizer=True,
        load=str(write(content, tmp_path)),
        ckpt_step=None,
        finetune=False,
        no_load_optim=False,
        ckpt_format="torch_dist",
        **sizes(ep=4, etp=1),
    )
    check_resumable(wanted)
    vars(wanted).update(sizes(ep=2))
    message = "(dp_reshardable, tp=2, pp=1, ep=4, etp=1), and this run has tp=2, pp=1, ep=2, etp=2"
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_resumable(wanted)
    wanted.no_load_optim = True
    check_resumable(wanted)


def test_states_of_as_many_optimizers_are_left_alone() -> None:
    one = {"optimizer": {"param_groups": []}, "param_state_sharding_type": "fully_reshardable"}
    assert dealt(one, 1) is one
    several = {0: one, 1: one}
    assert dealt(several, 2) is several
