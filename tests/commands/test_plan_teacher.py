"""The teacher's rows of `plan`: parameters, what spreads over whom, work by arithmetic.

`tests/edge/test_distill.py` holds the parameters against those of a run.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ep_plugin.cli import main
from ep_plugin.commands.plan import teachers_model
from ep_plugin.commands.plan.taught import Taught, taught
from ep_plugin.commands.plan.teachers_model import Teacher, read_teacher
from ep_plugin.errors import ConfigError
from ep_plugin.moe.parallel import ParallelConfig
from ep_plugin.presets import layer_params, load, total_params

STUDENT = load("ds-350m-mos-l21")
TEACHER = "ds-350m-prmoe-32-64"


def plan(teacher: str = TEACHER, **typed: Any) -> Taught:
    """Return the teacher's row beside STUDENT on 32 GPUs."""
    given = {"ep_teacher": teacher, "ep_teacher_layout": None, "ep_distill_stop": 0.7}
    given |= {"micro_batch": 1, "seq_length": None, "recompute": False}
    args = argparse.Namespace(**given | {k: v for k, v in typed.items() if k in given})
    degrees = {"world_size": 32, "ep": 8, **{k: v for k, v in typed.items() if k not in given}}
    parallel = ParallelConfig(**degrees)
    return taught(read_teacher(args, STUDENT), STUDENT, parallel, args)


@pytest.mark.parametrize("name", [TEACHER, "ds-1.3b-moe128", "ds-350m-mos-l21"])
def test_all_ranks_together_hold_the_teacher(name: str) -> None:
    preset = load(name)
    routing = replace(preset.routing, expert_bias=False)  # a buffer
    expected = total_params(replace(preset, routing=routing))
    row = plan(name)
    assert row.dense_params + 8 * row.expert_params == expected
    assert row.weights == 2 * (row.dense_params + row.expert_params)


def test_its_layout_is_the_student_s_or_its_own() -> None:
    own = plan(ep_teacher_layout="tp=4,ep=2,etp=1")
    assert (own.tp, own.ep, own.etp) == (4, 2, 1)
    students = plan(tp=2, ep=4, etp=1)
    assert (students.tp, students.ep, students.etp) == (2, 4, 1)
    assert own.expert_params == 2 * students.expert_params
    assert own.dense_params < students.dense_params < plan().dense_params


def test_work_of_a_model_that_is_its_own_teacher() -> None:
    """A forward beside a forward and a backward of twice the work; recomputing is one more."""
    same = STUDENT.name
    assert plan(same).step == pytest.approx(1 + 1 / 3)
    assert plan(same, recompute=True).step == pytest.approx(1 + 1 / 4)
    assert plan(same, ep_distill_stop=0.25).run == pytest.approx(1 + 1 / 12)
    # Every rank runs its own micro-batch whole, which two students' ranks share otherwise.
    one = plan(same, tp=2, etp=1, ep_teacher_layout="tp=1,ep=8")
    assert one.step == pytest.approx(1 + 2 / 3)
    # Four ranks run four micro-batches, a quarter of each.
    four = plan(same, ep_teacher_layout="tp=4,ep=8,etp=1")
    assert four.step == pytest.approx(1 + 1 / 3)


def test_logits_are_what_they_hold() -> None:
    """Beside a student's slice of n logits: 15n at the divergence, less 8n that come later."""
    tokens, entries = 2048, STUDENT.model.vocab
    assert plan().activations == 7 * tokens * entries
    assert plan(tp=2, etp=1).activations == 7 * tokens * entries // 2
    assert plan(micro_batch=4).activations == 4 * 7 * tokens * entries
    gathered = plan(tp=8, ep=4, etp=1, ep_teacher_layout="tp=4,ep=8,etp=1")
    assert gathered.activations == pytest.approx((4 + 2 / 4 - 8 / 8) * tokens * entries)


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--preset", STUDENT.name, "--gpus", "32", "--ep", "8"]
    assert main([*words, "--json"]) == 0
    (alone,) = json.loads(capsys.readouterr().out)
    assert "teacher" not in alone
    assert main([*words, "--ep-teacher", TEACHER, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    beside = row.pop("teacher")
    added = (beside["weights"] + beside["activations"]) / 1e9
    assert row.pop("total_gb") == pytest.approx(alone.pop("total_gb") + added)
    assert row == alone
    assert main([*words, "--ep-teacher", TEACHER, "--gpu-gb", "11"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[1].endswith("no")
    assert shown[3].split()[:2] == ["8", "tp=1,ep=8,etp=1"]
    assert shown[-1].startswith("until 0.7 of the run a teacher is in the total above")
    for wrong, message in (
        ("--ep-teacher nowhere", "is neither a folder nor a preset; use the folder that --save"),
        (f"--ep-teacher {TEACHER} --ep-teacher-layout tp=3", "tp (3) must divide the 32 ranks"),
        (f"--ep-teacher {TEACHER} --ep-teacher-layout 3", "parallel sizes; got '3'; use "),
        (f"--ep-teacher {TEACHER} --ep-teacher-layout pp=2", "a teacher runs on one; use pp=1"),
        (f"--ep-teacher {TEACHER} --ep-distill-stop 1.5", "above 0 and at most 1; got 1.5"),
        (f"--ep-teacher {TEACHER} --pp 2", "needs a student on one pipeline stage"),
        (f"--ep-teacher {TEACHER} --cp 2", "needs whole sequences on each rank; use --cp 1"),
        (
            f"--ep-teacher {TEACHER} --tp 2 --ep-teacher-layout tp=1,ep=1,etp=3",
            "must divide the 32",
        ),
        (f"--ep-teacher {TEACHER} --ep-teacher-layout tp=32,ep=1,etp=1", "has 16 attention heads"),
        (
            "--ep-teacher mixtral-8x7b",
            "has a vocabulary of 32000, and ds-350m-mos-l21 one of 50304",
        ),
    ):
        assert main([*words, *wrong.split()]) == 2
        assert message in capsys.readouterr().err, wrong


def test_layers_have_degrees_of_their_own() -> None:
    """At 64 ranks a layer of 32 experts is there twice: each rank has one expert of every layer."""
    model = load(TEACHER).model
    one = layer_params(model, 64).experts // 64
    assert plan(ep=64, world_size=64).expert_params == one * sum(n > 0 for n in model.experts)


def test_without_ep_only_rows_that_the_teacher_has_are_shown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A teacher of at most 64 experts has none at 128 ranks; a student of 128 has."""
    words = ["plan", "--preset", "ds-1.3b-moe128", "--gpus", "128", "--ep-teacher", TEACHER]
    assert main([*words, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["ep"] for row in rows] == [1, 2, 4, 8, 16, 32, 64]
    assert main([*words, "--ep", "128"]) == 2
    assert "has 64 experts, which ep (128)" in capsys.readouterr().err


class Stored:
    """A checkpoint of run arguments alone."""

    folder = Path("teacher")

    def __init__(self, **args: Any) -> None:
        self.tensors: dict[str, Any] = {}
        self.common = {"args": argparse.Namespace(**args)}


GOOD = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 2}
GOOD |= {"padded_vocab_size": 128, "kv_channels": 16}
ODD = st.one_of(
    *(st.none(), st.booleans(), st.floats(), st.text(max_size=3), st.lists(st.integers())),
    *(st.integers(-(10**20), 10**20), st.just(torch.float32)),
)


@given(
    st.dictionaries(
        st.sampled_from(
            [
                *GOOD,
                *("num_experts", "moe_router_topk", "moe_ffn_hidden_size", "q_lora_rank"),
                *("multi_latent_attention", "ep_dense_activation", "seq_length", "swiglu"),
            ]
        ),
        ODD,
        max_size=3,
    )
)
@settings(deadline=None)
def test_odd_run_arguments_are_read_or_refused(odd: dict[str, Any]) -> None:
    args = argparse.Namespace(ep_teacher="teacher", ep_distill_stop=0.7)
    student = load("mos-nano")
    with pytest.MonkeyPatch.context() as patch:
        module = "ep_plugin.checkpoint.formats.megatron_dist.open_checkpoint"
        patch.setattr(module, lambda path: Stored(**GOOD | odd))
        patch.setattr(teachers_model.Path, "exists", lambda self: True)
        try:
            found = read_teacher(args, student)
        except ConfigError:
            return
    assert isinstance(found, Teacher)
