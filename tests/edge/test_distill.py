"""A teacher in Megatron's loop: one loss in every layout, its stop, its resume, its own place."""

import re
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from loop import MOE, OURS, ROOT, launch, train

from ep_plugin.checkpoint.formats.megatron_dist import open_checkpoint
from ep_plugin.cli import main
from ep_plugin.commands.plan.taught import taught
from ep_plugin.commands.plan.teachers_model import read_teacher
from ep_plugin.commands.report.events import Run, read_run
from ep_plugin.megatron.distill.seam import Distillation
from ep_plugin.moe.parallel import ParallelConfig
from ep_plugin.presets import load

pytestmark = [pytest.mark.megatron, pytest.mark.newest]

KL = "distillation loss"
STOP = ("--ep-distill-stop", "0.75", "--ep-distill-temperature", "2", "--ep-distill-weight", "3")
ONE_LAYER = ("--num-layers", "1", "--moe-layer-freq", "[1]")
WATCHED = (str(ROOT / "tests" / "helpers" / "taught_run.py"),)
FOUR = ("--train-iters", "4", "--finetune", "--save-interval", "2")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two layers of four experts, a little trained, that says much with each."""
    folder = tmp_path_factory.mktemp("teacher")
    save = ("--save", str(folder / "at"), "--save-interval", "2", "--init-method-std", "0.2")
    train(1, OURS, folder / "tb", *MOE, "--train-iters", "2", *save)
    return folder / "at"


@pytest.fixture(scope="module")
def student(teacher: Path) -> Path:
    """Its second layer alone."""
    target = teacher.parent / "student"
    words = ["--from", str(teacher), "--to", str(target), "--keep-layers", "1", "--skip-parity"]
    assert main(["convert", *words]) == 0
    return target


def distil(
    ranks: int,
    folder: Path,
    student: Path,
    teacher: Path,
    *flags: str,
    runner: tuple[str, ...] = OURS,
) -> tuple[Run, str]:
    """Return what was logged, and what was printed."""
    where = ("--load", str(student), "--ep-teacher", str(teacher))
    words = (*MOE, *ONE_LAYER, *where, *STOP, *flags, "--tensorboard-dir", str(folder))
    done = launch(ranks, runner, *words)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return read_run(folder), done.stdout


def values(run: Run, tag: str) -> list[float]:
    return [value for _, value in run.series(tag)]


@pytest.fixture(scope="module")
def on_one_rank(student: Path, teacher: Path) -> Run:
    folder = teacher.parent / "one"
    return distil(1, folder / "tb", student, teacher, *FOUR, "--save", str(folder / "at"))[0]


def test_it_is_logged_apart_and_stops(
    on_one_rank: Run, student: Path, teacher: Path, tmp_path: Path
) -> None:
    """Three of four steps are before 0.75; `lm loss` is what it is without a teacher."""
    assert [step for step, _ in on_one_rank.series(KL)] == [1, 2, 3]
    assert min(values(on_one_rank, KL)) > 0.05
    alone = train(1, OURS, tmp_path, *MOE, *ONE_LAYER, "--load", str(student), *FOUR)
    losses, theirs = values(on_one_rank, "lm loss"), values(alone, "lm loss")
    assert losses[0] == pytest.approx(theirs[0], rel=1e-6)
    assert losses[3] != pytest.approx(theirs[3], rel=1e-5)
    assert values(on_one_rank, "grad-norm")[0] != pytest.approx(
        values(alone, "grad-norm")[0], rel=1e-3
    )
    assert alone.series(KL) == []


def test_the_teacher_is_not_saved(on_one_rank: Run, teacher: Path) -> None:
    names = open_checkpoint(teacher.parent / "one" / "at").tensors
    layers = {name.split(".")[2] for name in names if name.startswith("decoder.layers.")}
    assert layers == {"0"}
    assert not [name for name in names if "teacher" in name]


@pytest.fixture(scope="module")
def on_four_ranks(student: Path, teacher: Path) -> tuple[Run, str]:
    """Student EP=4, teacher TP=2 EP=2; a line is printed of two steps each."""
    layout = ("--expert-model-parallel-size", "4", "--ep-teacher-layout", "tp=2,ep=2,etp=1")
    flags = (*FOUR, *layout, "--log-interval", "2")
    folder = teacher.parent / "four"
    return distil(4, folder, student, teacher, *flags, runner=WATCHED)


def test_layouts_of_both_give_what_one_rank_gives(
    on_one_rank: Run, on_four_ranks: tuple[Run, str]
) -> None:
    """Losses, divergence and gradients."""
    for tag in ("lm loss", KL, "grad-norm", "load_balancing_loss"):
        expected = pytest.approx(values(on_one_rank, tag), rel=1e-5)
        assert values(on_four_ranks[0], tag) == expected, tag


def test_chunks_change_nothing(
    on_one_rank: Run, student: Path, teacher: Path, tmp_path: Path
) -> None:
    layout = ("--expert-model-parallel-size", "2", "--ep-overlap", "chunked")
    two, _ = distil(2, tmp_path, student, teacher, *FOUR, *layout)
    for tag in ("lm loss", KL, "grad-norm"):
        expected = pytest.approx(values(on_one_rank, tag), rel=1e-5)
        assert values(two, tag) == expected, tag


def test_after_the_stop_its_weights_and_its_groups_are_gone(on_four_ranks: tuple[Run, str]) -> None:
    lines = re.findall(r"teacher at (\d) of \d+: (.*)", on_four_ranks[1])
    assert sorted(rank for rank, _ in lines) == ["0", "1", "2", "3"]
    for _, line in lines:
        alone, *taught, after = (tuple(map(int, pair.split("/"))) for pair in line.split())
        assert len(taught) == 3
        assert min(groups for groups, _ in taught) > alone[0]
        assert min(weights for _, weights in taught) > 10
        assert after == (alone[0], 0)


def test_its_parameters_are_those_that_plan_counts(
    on_four_ranks: tuple[Run, str], teacher: Path
) -> None:
    typed = {"ep_teacher": str(teacher), "ep_teacher_layout": "tp=2,ep=2,etp=1"}
    sizes = {"micro_batch": 2, "seq_length": 32, "recompute": False, "ep_distill_stop": 0.75}
    args, student = Namespace(**typed, **sizes), load("mos-nano")
    found = taught(read_teacher(args, student), student, ParallelConfig(world_size=4, ep=4), args)
    held = re.findall(r"teacher at \d of (\d+):", on_four_ranks[1])
    assert [int(size) for size in held] == [found.dense_params + found.expert_params] * 4


def test_an_interval_is_the_mean_of_its_distilled_steps(on_four_ranks: tuple[Run, str]) -> None:
    """Steps 1 and 2; then 3 alone, as 4 is past the stop."""
    run, printed = on_four_ranks
    found = [float(value) for value in re.findall(rf"{KL}: ([0-9.E+-]+)", printed)]
    each = values(run, KL)
    assert found == pytest.approx([each[0], sum(each[:2]) / 2, each[2]], rel=1e-5)


def test_killed_and_resumed_ends_at_the_same_loss(
    on_one_rank: Run, teacher: Path, tmp_path: Path
) -> None:
    """From the save after step 2: step 3 is distilled, step 4 is not."""
    saved = teacher.parent / "one" / "at"
    resumed, _ = distil(1, tmp_path, saved, teacher, "--train-iters", "4", "--ckpt-step", "2")
    for tag in ("lm loss", KL, "grad-norm"):
        expected = [(s, v) for s, v in on_one_rank.series(tag) if s > 2]
        assert resumed.series(tag) == expected, tag


@pytest.mark.parametrize(
    ("ranks", "layout", "teachers"),
    [
        (2, "--expert-model-parallel-size 2", "tp=2,ep=1,etp=1"),
        (2, "--tensor-model-parallel-size 2 --expert-tensor-parallel-size 1", "tp=1,ep=2"),
    ],
)
def test_a_model_is_its_own_teacher(
    teacher: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ranks: int,
    layout: str,
    teachers: str,
) -> None:
    """The weights are loaded as they are, whatever the slices: the divergence is 0 at first."""
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    where = ("--load", str(teacher), "--finetune", "--ep-teacher", str(teacher))
    flags = (*where, *layout.split(), "--ep-teacher-layout", teachers, "--train-iters", "2")
    run = train(ranks, OURS, tmp_path, *MOE, *flags)
    found = values(run, KL)
    assert abs(found[0]) < 1e-6 < found[1]
    assert len(found) == 2


REFUSED: dict[str, str] = {
    "--ep-distill-weight 2": "is about a teacher, and there is none; use --ep-teacher CKPT",
    "--ep-teacher nowhere": "nowhere",
    "--ep-teacher TEACHER --ep-teacher-layout pp=2": "and a teacher runs on one; use pp=1",
    "--ep-teacher TEACHER --ep-teacher-layout tp=3": "tp (3) must divide the 1 ranks",
    "--ep-teacher TEACHER --ep-overlap two_batch": "takes apart",
    "--ep-teacher TEACHER --ep-teacher-layout tp=2 --sft": "--sft packs sequences, and a teacher",
    "--ep-teacher TEACHER --seq-length 64 --max-position-embeddings 64 --vocab-size 64": (
        "and the student one of 64; use a teacher"
    ),
    "--ep-teacher TEACHER --ep-distill-stop 1.5": "must be above 0 and at most 1; got '1.5'",
    "--ep-teacher TEACHER --ep-teacher-layout tp=two": "must be parallel sizes; got 'tp=two'; use ",
}


@pytest.mark.parametrize("words", REFUSED)
def test_refusals(teacher: Path, words: str) -> None:
    """In one sentence, before any step."""
    flags = words.replace("TEACHER", str(teacher)).split()
    done = launch(1 + ("--sft" in flags), OURS, *MOE, "--train-iters", "1", *flags)
    assert done.returncode != 0
    assert REFUSED[words] in done.stderr, done.stderr[-2000:]
    assert "lm loss" not in done.stdout
    assert "Traceback" not in done.stderr


def test_heads_of_multi_token_prediction_are_left_alone(teacher: Path, tmp_path: Path) -> None:
    """A weight that is nearly nothing: all is as without a teacher, which is asked nevertheless."""
    flags = (*MOE, "--mtp-num-layers", "1", "--train-iters", "2")
    alone = train(1, OURS, tmp_path / "alone", *flags)
    words = ("--ep-teacher", str(teacher), "--ep-distill-weight", "1e-9", "--ep-distill-stop", "1")
    beside = train(1, OURS, tmp_path / "beside", *flags, *words)
    tags = ("lm loss", "mtp_1 loss", "grad-norm")
    for tag in tags:
        assert values(beside, tag) == pytest.approx(values(alone, tag), rel=1e-5), tag
    assert len(values(beside, tags[1])) == len(values(beside, KL)) == 2
    assert min(values(beside, KL)) > 0


def asked(labels: list[Any], given: Any) -> list[Any]:
    """Return of which logits the divergence was made, in a forward that asks for these losses."""
    state, seen = Distillation(), []
    state.teacher = SimpleNamespace(logits=lambda *given, width, **more: torch.zeros(1, 1, width))
    state.plan = SimpleNamespace(vocabulary=2)
    args = SimpleNamespace(ep_distill_temperature=1.0, ep_distill_weight=1.0)
    group = SimpleNamespace(size=lambda: 1)
    module = SimpleNamespace(get_args=lambda: args, get_tensor_model_parallel_group=lambda: group)

    def loss(model: Any, labels: Any, logits: torch.Tensor) -> torch.Tensor:
        return logits.sum(-1)

    def forward(model: Any, *inputs: Any, **more: Any) -> None:
        for label in labels:
            logits = torch.tensor([[[1.0, 3.0]]], requires_grad=True)
            state.loss(loss, model, label, logits).sum().backward()
            assert logits.grad is not None
            seen.append(bool((logits.grad != 1).any()))

    with patch("ep_plugin.megatron.distill.seam.import_module", lambda name: module):
        state.forward(forward, SimpleNamespace(training=True), *given)
    return seen


def test_the_main_head_alone_is_taught() -> None:
    """Megatron asks the heads of multi-token prediction first, for labels of their own."""
    rolled, labels = object(), object()
    assert asked([rolled, labels], (None, None, None, None, labels)) == [False, True]


def test_a_model_without_labels_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """A script that computes its own loss would never ask the teacher."""
    with pytest.raises(SystemExit):
        asked([], (None, None, None))
    assert "this script's forward step gives the model none" in capsys.readouterr().err


def test_no_gradient_reaches_the_teacher() -> None:
    from ep_plugin.megatron.distill.kl import divergence

    logits = [torch.randn(3, 2, 5, requires_grad=True) for _ in range(2)]
    divergence(logits[0], logits[1], 1.0, 5).sum().backward()
    assert logits[0].grad is not None
    assert logits[1].grad is None
