"""`ep-plugin report`: the numbers are those that were logged, the page stands alone."""

import json
import re
import struct
from html.parser import HTMLParser
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from ep_plugin.cli import main
from ep_plugin.commands.report.events import TRAIN, VALIDATION, read_run

GIB = 1 << 30
LOSSES = {"evaluate-dense": 3.25, "evaluate-converted": 3.2501, "evaluate-moe": 2.5}


def log_run(folder: Path, first: int, experts: int) -> None:
    with SummaryWriter(str(folder)) as writer:
        for i in range(first, first + 20, 5):
            writer.add_scalar(TRAIN, 5 - 0.05 * i, i)
            writer.add_scalar(VALIDATION, 5.5 - 0.05 * i, i)
            if experts:
                writer.add_scalar("load_balancing_loss", 1.1, i)
            for expert in range(experts):
                for layer in (2, 4):
                    tag = f"ep/tokens_per_expert/layer_{layer}/expert_{expert}"
                    writer.add_scalar(tag, (expert + 1) / 36, i)
        writer.add_scalar(VALIDATION, 9.0, i)  # of the test set, as Megatron ends


@pytest.fixture
def run(tmp_path: Path) -> Path:
    log_run(tmp_path / "tensorboard" / "dense", 5, 0)
    log_run(tmp_path / "tensorboard" / "moe", 25, 8)
    logs = tmp_path / "logs"
    logs.mkdir()
    for seconds, (name, loss) in enumerate(LOSSES.items(), start=10):
        line = (
            " validation loss at iteration 0 on {} set | lm loss value: {:.6E} | lm loss PPL: 1 |\n"
        )
        log = "noise\n" + line.format("validation", loss) + line.format("test", 9.0)
        (logs / f"{name}.log").write_text(log)
        usage = {"seconds": seconds, "peak_rss_bytes": seconds * GIB}
        (logs / f"{name}.usage.json").write_text(json.dumps(usage))
    (tmp_path / "converted").mkdir()
    parity = json.dumps({"logits_max_abs_diff": 2e-6})
    (tmp_path / "converted" / "parity.json").write_text(parity)
    return tmp_path


NOTED = ["--experts", "8", "--topk", "2", "--ep", "2", "--ranks", "2", "--device", "cpu"]


def test_summary_holds_what_was_logged(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["report", "--run", str(run), *NOTED, "--resumed-at-iteration", "30", "--json"]) == 0
    )
    expected = {
        "dense_final_val_loss": 3.25,
        "moe_initial_val_loss": 3.2501,
        "moe_final_val_loss": 2.5,
        "parity_max_abs_diff": 2e-6,
        "peak_rss_gib": 12.0,
        "seconds": 33.0,
        "experts": 8,
        "topk": 2,
        "ep": 2,
        "ranks": 2,
        "device": "cpu",
        "resumed_at_iteration": 30,
    }
    assert json.loads((run / "summary.json").read_text()) == expected
    assert json.loads(capsys.readouterr().out) == expected


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.images: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag == "img":
            self.images.append(found["src"] or "")
        self.links += [value or "" for name, value in attrs if name == "href"]


def test_page_stands_alone_and_holds_every_picture(run: Path) -> None:
    assert main(["report", "--run", str(run), *NOTED]) == 0
    page = _Page()
    text = (run / "report.html").read_text()
    page.feed(text)
    assert len(page.images) == 3
    assert all(source.startswith("data:image/png;base64,") for source in page.images)
    assert not page.links
    assert not re.search(r"https?://", text)
    assert "3.2500" in text
    for name in ("loss.png", "balance.png", "experts.png"):
        header = (run / name).read_bytes()[:24]
        width, height = struct.unpack(">II", header[16:24])
        assert header[:8] == b"\x89PNG\r\n\x1a\n"
        assert width > 800
        assert height > 300


def test_shares_are_by_layer_and_expert(run: Path) -> None:
    shares = read_run(run / "tensorboard" / "moe").shares()
    assert list(shares) == [2, 4]
    assert list(shares[2]) == list(range(8))
    assert [iteration for iteration, _ in shares[2][0]] == [25, 30, 35, 40]
    assert shares[4][7][0][1] == pytest.approx(8 / 36)


def test_what_a_resumed_run_wrote_counts_and_the_test_set_does_not(tmp_path: Path) -> None:
    for part, (first, last, loss) in enumerate(((1, 6, 3.0), (4, 5, 2.0))):
        with SummaryWriter(str(tmp_path), filename_suffix=f".{part}") as writer:
            for i in range(first, last + 1):
                writer.add_scalar(TRAIN, loss, i)
                writer.add_scalar(VALIDATION, loss + 1, i)
            writer.add_scalar(VALIDATION, 9.0, last)
    run = read_run(tmp_path)
    assert run.series(TRAIN) == [(1, 3.0), (2, 3.0), (3, 3.0), (4, 2.0), (5, 2.0)]
    assert run.series(VALIDATION) == [(i, loss + 1) for i, loss in run.series(TRAIN)]


def test_a_folder_that_is_no_run_is_refused(
    tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", "--run", str(tmp_path / "nothing")]) == 2
    assert "does not exist; use what --tensorboard-dir or --save" in capsys.readouterr().err
    (run / "logs" / "evaluate-moe.log").write_text("stopped early\n")
    assert main(["report", "--run", str(run)]) == 2
    assert "has no validation loss" in capsys.readouterr().err
    assert not (run / "summary.json").exists()


def test_a_run_too_short_to_have_logged_a_loss_is_refused(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (run / "tensorboard" / "dense").iterdir():
        path.unlink()
    with SummaryWriter(str(run / "tensorboard" / "dense")) as writer:
        writer.add_scalar(VALIDATION, 5.5, 3)
    assert main(["report", "--run", str(run)]) == 2
    assert "a run must have logged 'lm loss' to TensorBoard" in capsys.readouterr().err
    assert not (run / "report.html").exists()
