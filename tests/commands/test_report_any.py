"""`ep-plugin report` of any run: whatever is given is drawn, and what is missing is said."""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import pytest
from torch.utils.tensorboard import SummaryWriter

from ep_plugin.cli import main
from ep_plugin.commands.report.events import BALANCE, TRAIN, VALIDATION
from ep_plugin.commands.report.logs import read_log
from tests.commands import test_convert
from tests.commands.test_report import log_run

LINE = (
    " [2026-01-01 00:00:00] iteration {:8d}/     100 | consumed samples:           80 | elapsed "
    "time per iteration (ms): {:.1f} | learning rate: 9.0E-06 | global batch size:     8 | lm loss:"
    " {:.6E} | load_balancing_loss: 1.100000E+00 | loss scale: 1.0 | grad norm: 1.5 |{}\n"
)
VALIDATED = " validation loss at iteration 20 on validation set | lm loss value: 4.25E+00"


def write_log(path: Path, prefix: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        LINE.format(i, 1000 + i, 5 - i / 100, " Total" if i == 10 else "") for i in (10, 20, 30)
    ]
    lines.insert(2, f"{VALIDATED} | \n ----\n")
    path.write_text("start\n" + "".join(prefix + line for line in lines))
    return path


def report(*words: object) -> int:
    return main(["report", "--run", *map(str, words)])


def summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    assert (folder / "report.html").read_text().count("<img ") == len(list(folder.glob("*.png")))
    return found


def pictures(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*.png")}


@pytest.mark.parametrize("prefix", ["", "3: ", "[default1]:"])
def test_a_log_alone(prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a job, or of a user's own script; torchrun and Slurm may number its lines."""
    log = write_log(tmp_path / "job.log", prefix)
    assert read_log(log)[TRAIN] == {10: 4.9, 20: 4.8, 30: 4.7}
    assert read_log(log)[VALIDATION] == {20: 4.25}
    assert report(log) == 0
    folder = tmp_path / "job-report"
    found = summary(folder)
    assert pictures(folder) == {"loss", "balance", "speed"}
    assert (found["iterations"], found["train_loss"], found["val_loss"]) == (30, 4.7, 4.25)
    assert found["seconds_per_iteration"] == pytest.approx(1.025)
    said = capsys.readouterr().out
    assert "missing: tokens per expert" in said
    assert "tokens per expert" in (folder / "report.html").read_text()
    assert "validation loss: none" not in said


def test_a_tensorboard_folder_alone_and_below_others(tmp_path: Path) -> None:
    log_run(tmp_path / "run" / "tensorboard", 5, 8)
    (tmp_path / "run" / "cache").mkdir()
    for path in (tmp_path / "run", tmp_path / "run" / "tensorboard"):
        assert report(path) == 0
        assert pictures(path / "report") == {"loss", "balance", "experts"}
        found = summary(path / "report")
        assert found["fullest_expert"] == pytest.approx(8 * 8 / 36)
        assert any(line.startswith("seconds per iteration") for line in found["missing"])
    (event,) = (tmp_path / "run" / "tensorboard").glob("*tfevents*")
    assert report(event, write_log(tmp_path / "log.txt"), "--to", tmp_path / "to") == 0
    assert pictures(tmp_path / "to") == {"loss", "balance", "experts", "speed"}


def test_a_checkpoint_names_its_tensorboard_folder_and_its_experts(tmp_path: Path) -> None:
    log_run(tmp_path / "elsewhere", 5, 4)
    more = {"num_experts": 4, "moe_router_topk": 2, "expert_model_parallel_size": 2}
    more |= {"tensorboard_dir": str(tmp_path / "elsewhere"), "world_size": 8}
    test_convert.save_dense(tmp_path / "saved", **more)
    assert report(tmp_path / "saved", "--ranks", "16", "--to", tmp_path / "to") == 0
    found = summary(tmp_path / "to")
    assert [found[name] for name in ("experts", "topk", "ep", "ranks")] == [4, 2, 2, 16]
    assert found["read"] == [str(tmp_path / "elsewhere")]
    (tmp_path / "elsewhere").rename(tmp_path / "gone")
    assert report(tmp_path / "saved") == 2


def test_many_layers_experts_and_odd_values(tmp_path: Path) -> None:
    """A picture of some layers; an expert that was not logged, one value, nan, another release."""
    with SummaryWriter(str(tmp_path)) as writer:
        for layer in range(1, 31):
            for expert in range(1, 4):
                tag = f"ep/tokens_per_expert/layer_{layer}/expert_{expert}"
                writer.add_scalar(tag, 1 / 3, 10)
        writer.add_scalar(TRAIN, float("nan"), 10)
        writer.add_scalar(BALANCE, 1.0, 10)
    assert report(tmp_path) == 0
    found = summary(tmp_path / "report")
    assert found["train_loss"] is None
    assert found["fullest_expert"] == pytest.approx(1)
    assert "12 of 30 layers" in (tmp_path / "report" / "report.html").read_text()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p.mkdir(), "has none; use what --tensorboard-dir named"),
        (lambda p: p.write_text("hello\n"), "has no line of an iteration of Megatron's; use a"),
        (lambda p: p.write_bytes(b"\0" * 99), "has no line of an iteration of Megatron's; use a"),
        (lambda p: [log_run(p / name, 5, 0) for name in "ab"], "holds several runs ("),
        (lambda p: [write_log(p / f"{name}.log") for name in "ab"], "holds several logs ("),
    ],
    ids=["empty", "text", "binary", "two runs", "two logs"],
)
def test_what_is_no_run_is_one_sentence(
    make: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "given")
    assert report(tmp_path / "given") == 2
    said = capsys.readouterr().err
    assert re.search(re.escape(message), said)
    assert len(said.splitlines()) == 1
    assert not list(tmp_path.rglob("report.html"))


def test_the_examples_parse() -> None:
    from ep_plugin.cli import build_parser
    from ep_plugin.commands.report import EXAMPLES

    lines = re.findall(r"^  ep-plugin (report .*?)(?:   |$)", EXAMPLES, re.MULTILINE)
    assert len(lines) == 6
    for line in lines:
        assert isinstance(build_parser("report").parse_args(line.split()), argparse.Namespace)
