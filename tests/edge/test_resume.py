"""A run goes on at another layout as if never interrupted, or is refused in one sentence."""

import argparse
import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from loop import MOE, OURS, launch
from stored import E, healthy, write

from ep_plugin.commands.report.events import read_run
from ep_plugin.errors import ConfigError
from ep_plugin.megatron.arguments.resume import check_resumable
from ep_plugin.megatron.cpu.local_layers import TRANSLATION
from ep_plugin.megatron.seams import upcycling_by_hand
from ep_plugin.megatron.seams.chained import dealt
from ep_plugin.megatron.seams.patches import Patches
from ep_plugin.moe.config import MoEConfig
from ep_plugin.moe.experts.experts import Experts
from ep_plugin.moe.groups import ExpertGroups

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


def test_a_degree_for_each_layer_goes_on_at_other_degrees(tmp_path: Path) -> None:
    """Layers of 6 and 8 experts on 4, 2 and 1 ranks: two, then one copy of the first one's."""
    saved = str(tmp_path / "saved")
    flags = (
        *("--train-iters", "4", *MOE, "--num-experts", "8", "--moe-layer-freq", "[1,1]"),
        *("--ep-experts-per-layer", "6,8", "--use-distributed-optimizer", "--save-interval", "2"),
        *("--moe-router-score-function", "sigmoid", "--moe-router-enable-expert-bias"),
        *("--moe-router-bias-update-rate", "1e-2"),
    )
    save, load = ("--save", saved, "--ep-audit-save"), ("--load", saved)
    found = []
    for ranks, further in ((4, save), (2, load), (1, load)):
        folder = tmp_path / str(ranks)
        ep = ("--expert-model-parallel-size", str(ranks), "--tensorboard-dir", str(folder))
        start = ("--ckpt-step", "2") if "--load" in further else ()
        done = launch(ranks, OURS, *flags, *ep, *further, *start)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        found.append(read_run(folder))
    whole, *resumed = found
    for tag in ("grad-norm", "lm loss validation"):
        expected = [v for i, v in whole.series(tag) if i > 2]
        assert expected
        for run in resumed:
            assert [v for i, v in run.series(tag) if i > 2] == pytest.approx(expected, rel=1e-5)


def run_args(load: Path, **changes: Any) -> argparse.Namespace:
    """What a run with experts on four ranks has of its command line."""
    values = {
        "load": str(load),
        "ckpt_step": None,
        "finetune": False,
        "no_load_optim": False,
        "num_experts": E,
        "moe_router_topk": 2,
        "use_distributed_optimizer": True,
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 1,
        "expert_model_parallel_size": 4,
        "expert_tensor_parallel_size": 1,
    }
    values |= dict.fromkeys(SCHEDULE, 0) | {"train_iters": 4, "global_batch_size": 4, "lr": 0.01}
    return argparse.Namespace(**(values | changes))


SCHEDULE = (
    *("override_opt_param_scheduler", "use_checkpoint_opt_param_scheduler", "min_lr"),
    *(
        "skip_train",
        "train_samples",
        "lr_decay_iters",
        "lr_warmup_iters",
        "lr_warmup_fraction",
        "lr_decay_style",
    ),
    *("start_weight_decay", "end_weight_decay", "weight_decay_incr_style"),
)
ONE: dict[str, Any] = {"param_groups": []}  # the state of one optimizer
SHARDED = ONE | {"param_state_sharding_type": "fully_reshardable"}
EP2 = {"expert_model_parallel_size": 2}
EP1 = {"expert_model_parallel_size": 1, "expert_tensor_parallel_size": 2}
PLAIN = {"use_distributed_optimizer": False}
# what was saved: arguments, beside the tensors; what the run is; what is wrong, and the way out
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], str, str]] = {
    "dense": ({"num_experts": None}, {}, {}, "a model without experts", "ep-plugin convert --from"),
    "no such model": ({}, {}, {"num_experts": None}, "with 4 experts", "use --num-experts 4"),
    "other experts": ({}, {}, {"num_experts": 8}, "--num-experts is 8", "use --num-experts 4"),
    "other widths": (
        {"ffn_hidden_size": 64, "moe_ffn_hidden_size": None},
        {},
        {"moe_ffn_hidden_size": 32},
        "experts of --moe-ffn-hidden-size 64, and here it is 32",
        "use --moe-ffn-hidden-size 64",
    ),
    "another shared expert": (
        {"moe_shared_expert_intermediate_size": 64},
        {},
        {"moe_shared_expert_intermediate_size": 32},
        "--moe-shared-expert-intermediate-size 64, and here it is 32",
        "use --moe-shared-expert-intermediate-size 64",
    ),
    "no optimizer": ({}, {"optimizer": None}, {}, "no optimizer state", "use --finetune"),
    "plain, wanted distributed": (
        *({}, {"optimizer": ONE}, {}, "saved without --use-distributed-optimizer"),
        "leave out --use-distributed-optimizer",
    ),
    "distributed, wanted plain": (
        *({}, {"optimizer": SHARDED}, PLAIN, "saved with --use-distributed-optimizer"),
        "use --use-distributed-optimizer",
    ),
    "one optimizer, two wanted": (
        *(
            {},
            {"optimizer": ONE},
            PLAIN | EP2,
            "the state of one optimizer, and this run has a second one",
        ),
        "use --expert-model-parallel-size 1 --expert-tensor-parallel-size 2",
    ),
    "two optimizers, one wanted": (
        *(
            EP2,
            {"optimizer": {0: ONE, 1: ONE}},
            PLAIN | EP1,
            "the state of two optimizers, and this run has one",
        ),
        "use --expert-model-parallel-size 2",
    ),
    "schedule": (
        *({}, {"optimizer": SHARDED, "opt_param_scheduler": {"max_lr": 0.1, "lr_decay_steps": 8}}),
        *({}, "(--lr 0.1, here 0.01; --lr-decay-iters, in samples, 8, here 16)"),
        "use --override-opt-param-scheduler",
    ),
    "buckets": (
        {"tensor_model_parallel_size": 2, **EP2},
        {
            "optimizer": {0: SHARDED, 1: SHARDED},
            "content_metadata": {"distrib_optim_sharding_type": "dp_reshardable"},
        },
        {"expert_tensor_parallel_size": None},
        "(dp_reshardable, tp=2, pp=1, ep=2, etp=2), and this run has tp=2, pp=1, ep=4, etp=2",
        "use --expert-model-parallel-size 2, which then saves by parameter, or --no-load-optim",
    ),
}


def test_other_settings_than_those_saved_are_told(tmp_path: Path) -> None:
    content = healthy()
    saved = {"ep_distill_weight": 0.5, "ep_teacher": "t", "moe_router_topk": 2, "ep_gemm": "loop"}
    vars(content.common["args"]).update(saved)
    content.common["optimizer"] = SHARDED
    folder = write(content, tmp_path)
    same = run_args(folder, **saved)
    assert check_resumable(same) is None
    other = {"ep_distill_weight": 1.0, "ep_teacher": None, "moe_router_topk": 1, "ep_gemm": "auto"}
    said = check_resumable(run_args(folder, **saved | other))
    assert said is not None
    told = said.partition(": ")[2].split("; ")
    assert sorted(told) == [
        "--ep-distill-weight 0.5, here 1.0",
        "--ep-teacher 't', here None",
        "--moe-router-topk 2, here 1",
    ]
    assert check_resumable(run_args(folder, **saved | other, finetune=True)) is None


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_resumed_is_refused(case: str, tmp_path: Path) -> None:
    """And what the sentence says to use is taken."""
    saved, beside, run, wrong, way = REFUSED[case]
    content = healthy()
    vars(content.common["args"]).update(saved)
    content.common |= beside
    folder = write(content, tmp_path)
    with pytest.raises(ConfigError, match=re.escape(wrong)) as refused:
        check_resumable(run_args(folder, **run))
    assert way in str(refused.value)
    if "override" in way:
        check_resumable(run_args(folder, override_opt_param_scheduler=True))
        check_resumable(run_args(folder, lr=0.1, lr_decay_iters=2))
    if "optim" in way or way == "use --finetune":
        check_resumable(run_args(folder, **run, finetune=True))
        check_resumable(run_args(folder, **run, no_load_optim=True))
        check_resumable(run_args(folder, **run, skip_train=True))
        check_resumable(run_args(folder, **run, train_iters=None))
    flags = {flag.replace("-", "_"): int(n) for flag, n in re.findall(r"--([a-z-]+) (\d+)", way)}
    if flags:
        other_model = any("expert" in name or "ffn" in name for name in flags)
        alone = other_model and "expert_model_parallel_size" not in flags
        check_resumable(run_args(folder, **run | flags, no_load_optim=alone))


def test_what_can_be_resumed_is_left_alone(tmp_path: Path) -> None:
    """Each kind of state where it belongs, and anything in a release, or a new run."""
    for number, (state, run) in enumerate(
        (
            *((SHARDED, {}), ({0: SHARDED, 1: SHARDED}, EP1), (ONE, PLAIN | EP1)),
            ({0: ONE, 1: ONE}, PLAIN | EP2),
        )
    ):
        content = healthy()
        content.common["optimizer"] = state
        check_resumable(run_args(write(content, tmp_path / str(number)), **run))
    check_resumable(run_args(tmp_path / "nothing"))
    (tmp_path / "0" / "iter_0000030").rename(tmp_path / "0" / "release")
    (tmp_path / "0" / "latest_checkpointed_iteration.txt").write_text("release")
    check_resumable(run_args(tmp_path / "0", **PLAIN))


@pytest.mark.skipif(find_spec(TRANSLATION) is None, reason="from megatron-core 0.19 on")
def test_a_gpt_s_state_into_a_hybrid_model_is_looked_at_where_megatron_loads_it(
    tmp_path: Path,
) -> None:
    """Under --finetune it does, unless the checkpoint says that it has none."""
    hybrid = PLAIN | EP1 | {"hybrid_layer_pattern": "*E*E", "finetune": True}
    content = healthy()
    del content.common["optimizer"]
    folder = write(content, tmp_path / "said")
    with pytest.raises(ConfigError, match="no optimizer state; use --no-load-optim"):
        check_resumable(run_args(folder, **hybrid))
    check_resumable(run_args(folder, **hybrid, no_load_optim=True))
    anew = hybrid | {"finetune": False, "pretrained_checkpoint": str(folder)}
    with pytest.raises(ConfigError, match="no optimizer state; use --no-load-optim"):
        check_resumable(run_args(tmp_path / "nothing", **anew))
    (folder / "iter_0000030").rename(folder / "release")
    (folder / "latest_checkpointed_iteration.txt").write_text("release")
    for distributed in (False, True):  # weights alone: Megatron looks for no state
        check_resumable(run_args(folder, **hybrid | {"use_distributed_optimizer": distributed}))
    content.common["args"].no_save_optim = True
    folder = write(content, tmp_path / "none")
    check_resumable(run_args(folder, **hybrid))
    with pytest.raises(ConfigError, match="no optimizer state; use --finetune"):
        check_resumable(run_args(folder, **hybrid | {"finetune": False}))


def test_per_rank_files_without_experts(tmp_path: Path) -> None:
    """`--ckpt-format torch`; of the optimizer Megatron has words of its own there."""
    file = tmp_path / "iter_0000030" / "mp_rank_00" / "model_optim_rng.pt"
    file.parent.mkdir(parents=True)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("30")
    torch.save({"args": argparse.Namespace(num_experts=E), "model": {}}, file)
    check_resumable(run_args(tmp_path))
    torch.save({"args": argparse.Namespace(num_experts=None), "model": {}}, file)
    with pytest.raises(ConfigError, match="a model without experts"):
        check_resumable(run_args(tmp_path))


def test_a_folder_that_megatron_does_not_read(tmp_path: Path) -> None:
    """It would begin with random weights."""
    (tmp_path / "config.json").write_text("{}")
    for names in ({"load": str(tmp_path)}, {"pretrained_checkpoint": str(tmp_path)}):
        with pytest.raises(ConfigError, match="is a Hugging Face model") as refused:
            check_resumable(run_args(**({"load": tmp_path / "nothing"} | names)))
        assert f"ep-plugin convert --from {tmp_path}" in str(refused.value)


def test_upcycling_by_hand_names_the_command() -> None:
    """Of a model with our experts, also in Megatron's list of one; others are left to Megatron."""
    place = import_module("megatron.core.transformer.moe.upcycling_utils")
    config = MoEConfig(num_experts=2, hidden_size=4, ffn_hidden_size=4)
    ours = torch.nn.Sequential(Experts(config, ExpertGroups()))
    patches = Patches()
    upcycling_by_hand.changes(patches)
    patches.apply()
    try:
        for model in (ours, [ours]):
            with pytest.raises(ConfigError, match="run ep-plugin convert --from DENSE"):
                place.upcycle_state_dict(model, model)
        with pytest.raises(AssertionError, match="mlp layer"):  # of Megatron's own function
            place.upcycle_state_dict([torch.nn.Linear(1, 1)], [None])
    finally:
        patches.undo()


def test_the_size_of_the_vocabulary_goes_along(tmp_path: Path) -> None:
    content = healthy()
    content.common["args"].ep_vocab_size = 199
    args = run_args(write(content, tmp_path), finetune=True)
    check_resumable(args)
    assert args.ep_vocab_size == 199


def test_states_of_as_many_optimizers_are_left_alone() -> None:
    one = {"optimizer": {"param_groups": []}, "param_state_sharding_type": "fully_reshardable"}
    assert dealt(one, 1) is one
    several = {0: one, 1: one}
    assert dealt(several, 2) is several


@pytest.mark.parametrize("text", ["", "4\n0", "\xff", "iter"])
def test_a_tracker_that_names_nothing_is_refused_with_the_newest_whole_one(
    text: str, tmp_path: Path
) -> None:
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    tracker.write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match="no iteration beside it is whole; use another --load"):
        check_resumable(run_args(tmp_path))
    for iteration, files in ((40, (".metadata", "metadata.json")), (60, (".metadata",)), (80, ())):
        folder = tmp_path / f"iter_{iteration:07d}"
        folder.mkdir()
        for name in files:
            (folder / name).touch()
    with pytest.raises(ConfigError, match="40 is the newest that is whole; use echo 40 > "):
        check_resumable(run_args(tmp_path, ckpt_step=40))
