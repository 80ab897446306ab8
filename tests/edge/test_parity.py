"""`ep-plugin parity`: healthy layouts pass, and each planted bug is found and named."""

import json
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from loop import MOE, RUN, SCRIPT, SHAPE
from warm import torchrun

from ep_plugin.cli import main
from ep_plugin.commands.parity import launch

# The bugs are planted in functions that older releases do not use with us.
pytestmark = [pytest.mark.megatron, pytest.mark.newest]
PLANTED = str(Path(__file__).parents[1] / "helpers" / "planted.py")
# A run as users have them: large, in bf16, with dropout, data and a layout.
LARGE = shlex.split(
    """
    --num-layers 12 --hidden-size 1024 --ffn-hidden-size 4096 --num-attention-heads 16
    --seq-length 2048 --max-position-embeddings 2048 --position-embedding-type rope --swiglu
    --disable-bias-linear --untie-embeddings-and-output-weights --bf16 --attention-dropout 0.1
    --micro-batch-size 2 --global-batch-size 256 --train-iters 10000 --data-path corpus
    --tokenizer-type SentencePieceTokenizer --tokenizer-model tokenizer.model
    --lr 3e-3 --min-lr 1e-4 --lr-decay-style cosine --lr-warmup-iters 2000 --clip-grad 1.0
    --num-experts 64 --moe-router-topk 2 --moe-ffn-hidden-size 512 --moe-aux-loss-coeff 1e-2
    --moe-z-loss-coeff 1e-3 --moe-token-dispatcher-type alltoall --seed 7
    --expert-model-parallel-size 8 --use-distributed-optimizer --load checkpoints
    """
)
PYRAMID = ("--ep-experts-per-layer", "4*16,8*16")
SEQUENCE_PARALLEL = "tp=2,ep=2,etp=1"


def parity(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], bugs: str, *flags: str
) -> tuple[int, list[dict[str, Any]]]:
    """Return the exit code and what the JSON says of each layout."""
    monkeypatch.setenv("EP_TEST_BUGS", bugs)
    monkeypatch.setattr(launch, "subprocess", SimpleNamespace(run=torchrun))
    code = main(["parity", PLANTED, SCRIPT, *LARGE, "--tiny", "--json", *flags])
    said = capsys.readouterr()
    assert said.out, said.err
    report = json.loads(said.out)
    assert report["passed"] == (code == 0)
    return code, report["layouts"]


def largest(layout: dict[str, Any], kind: str) -> float:
    return max(float(difference["relative"]) for difference in layout[kind])


def test_layouts_train_and_resume_as_one_rank_does_and_lost_moments_are_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Each layout resumes what the one before it saved; the third one's resume is spoilt."""
    written = tmp_path / "parity.json"
    flags = ("--resume", "--iterations", "2", "--output", str(written))
    layouts = ("--layouts", "ep=2", SEQUENCE_PARALLEL, "pp=2")
    code, found = parity(monkeypatch, capsys, "resumed3:moments", *flags, *layouts)
    assert code == 1
    assert json.loads(written.read_text())["layouts"] == found
    for healthy in found[:2]:
        assert healthy["passed"]
        assert healthy["first_difference"] is None
        names = {"lm loss", "grad norm", "load_balancing_loss", "z_loss"}
        assert {difference["name"] for difference in healthy["scalars"]} == names
        assert {d["iteration"] for d in healthy["scalars"]} == {1, 2, 3, 4}
        assert {d["iteration"] for d in healthy["resumed"]} == {3, 4}
        assert largest(healthy, "scalars") < 1e-5
        assert 0 < largest(healthy, "gradients") < 1e-5
        assert largest(healthy, "resumed") < 1e-6
        experts = [d for d in healthy["gradients"] if "linear_fc1.weight[" in d["name"]]
        assert len(experts) == 4 * 4  # layers, experts
    assert largest(found[2], "scalars") < 1e-5
    assert found[2]["first_difference"]["iteration"] == 4  # the update before it had no moments


def test_each_planted_bug_is_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MODEL_CLASS", "gpt")  # whose layers are named below
    bugs = "run1:scale,run2:norm,run3:router,run4:swap"
    layouts = ("ep=2", "ep=2,tp=1", SEQUENCE_PARALLEL, "tp=1,ep=2")
    flags = ("--iterations", "1", "--layouts", *layouts)
    code, (scale, norm, router, swap) = parity(monkeypatch, capsys, bugs, *flags)
    assert code == 1
    assert not any(layout["passed"] for layout in (scale, norm, router, swap))
    first = "decoder.layers.0.mlp.experts.experts.linear_fc1.weight[0]"
    assert scale["first_difference"]["name"] == first
    assert scale["first_difference"]["ratio"] == pytest.approx(2, rel=1e-4)
    assert norm["first_difference"]["name"] == "grad norm"
    assert largest(norm, "gradients") < 1e-5
    assert router["first_difference"]["name"] == "decoder.layers.0.mlp.router.weight"
    wrong = {d["name"] for d in router["gradients"] if d["relative"] > 1e-4}
    assert wrong == {f"decoder.layers.{layer}.mlp.router.weight" for layer in (0, 1)}
    assert largest(swap, "scalars") > 1e-5
    assert first in {d["name"] for d in swap["gradients"] if d["relative"] > 1e-2}


@pytest.mark.parametrize(
    ("flags", "aside"),
    [
        ([], []),
        (["--ep-preset", "qwen3-30b-a3b"], ["--moe-router-load-balancing-type global_aux_loss"]),
        (["--ep-preset", "ds-350m-prmoe-32-64"], ["--ep-drop-policy random"]),
        (["--ep-preset", "mixtral-8x7b", *PYRAMID, "--mtp-num-layers", "3"], []),
    ],
)
def test_tiny_needs_no_flag_beside_it_and_what_differs_by_nature_is_named(
    flags: list[str],
    aside: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(launch, "subprocess", SimpleNamespace(run=torchrun))
    assert main(["parity", SCRIPT, *flags, "--tiny", "--iterations", "2"]) == 0
    said = capsys.readouterr().out
    lines = [line for line in said.splitlines() if "differs between layouts by nature" in line]
    assert [line.partition("nature: ")[2].partition(":")[0] for line in lines] == aside
    assert said.splitlines()[-1].startswith("ep=2 ")
    assert said.splitlines()[-1].endswith("passed")


def test_a_hybrid_model_is_compared_as_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch, "subprocess", SimpleNamespace(run=torchrun))
    flags = (*SHAPE[2:], *RUN, *MOE, "--hybrid-layer-pattern", "*E*E", "--vocab-size", "256")
    line = [*flags, "--layouts", SEQUENCE_PARALLEL, "--iterations", "1", "--json"]
    assert main(["parity", SCRIPT, *line]) == 0
    (layout,) = json.loads(capsys.readouterr().out)["layouts"]
    assert largest(layout, "scalars") < 1e-6
    assert 0 < largest(layout, "gradients") < 1e-5
    experts = {
        d["name"].partition(".mlp")[0] for d in layout["gradients"] if "experts" in d["name"]
    }
    assert experts == {"decoder.layers.1", "decoder.layers.3"}


def test_a_run_that_fails_or_refuses_is_shown_in_its_own_words(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    script = tmp_path / "fails.py"
    script.write_text("raise RuntimeError('the script is lost')")
    assert main(["parity", str(script), *LARGE, "--layouts", "ep=2"]) == 1
    said = capsys.readouterr().err
    assert f"ep-plugin parity: one rank: {script} did not finish; it ended with\n" in said
    assert "RuntimeError: the script is lost" in said
    assert "torch.distributed.elastic" not in said
    refused = ("--delay-wgrad-compute", "--layouts", "ep=2")
    assert main(["parity", SCRIPT, *LARGE, "--tiny", *refused]) == 2
    sentence = "error: one rank: --delay-wgrad-compute delays weight gradients"
    assert f"ep-plugin parity: {sentence}" in capsys.readouterr().err


MISTAKES = {
    "a layout of nothing": (
        ["--layouts", "ep"],
        "--layouts takes tp, pp, cp, ep, etp and dp, each",
    ),
    "too few iterations": (
        ["--layouts", "ep=2", "--resume", "--iterations", "1"],
        "--iterations must be at least 2; got 1",
    ),
    "a layout that cannot be": (
        ["--layouts", "tp=2,ep=3,etp=1,dp=1"],
        "ep*etp (3) must divide them; use --layouts tp=2,ep=3,etp=1,dp=3",
    ),
    "layers of kinds that have no number": (
        ["--layouts", "ep=2", "--hybrid-layer-pattern", "M*E"],
        "--tiny cannot shrink --hybrid-layer-pattern, which describes each layer; use",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_sentence_before_anything_runs(
    mistake: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, message = MISTAKES[mistake]
    assert main(["parity", SCRIPT, *LARGE, "--tiny", *flags]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert message in said.err
