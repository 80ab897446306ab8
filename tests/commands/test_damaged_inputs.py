"""What commands read back may be damaged or hostile: it ends in one sentence, and writes nothing
outside."""

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hostile_lines as hostile
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.tensorboard import SummaryWriter

from ep_plugin import ConfigError
from ep_plugin.checkpoint.prompts import read_prompts
from ep_plugin.cli import main
from ep_plugin.commands import presets as presets_command
from ep_plugin.commands.bench import figures
from ep_plugin.commands.bench.measure import Timing
from ep_plugin.commands.plan import read_measured
from ep_plugin.commands.plan.network import Traffic
from ep_plugin.commands.report.events import TRAIN, Run
from ep_plugin.commands.report.logs import has_iterations, read_log
from ep_plugin.commands.report.pictures import shares_figure
from ep_plugin.written import check_place, write_whole
from tests.commands.test_report import run as quickstart  # noqa: F401

MARKUP = '<script>alert(1)</script>"onerror=x'
ODD_TEXTS = ("", "{", "[" * 100_000, "[]", "{}", "null", "1", MARKUP, "[NaN]", '{"a": 1, "a": 1}')
JSON = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.just(MARKUP)
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=5,
)


def drawn(examples: int) -> Any:
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@st.composite
def damaged(draw: Any, good: dict[str, Any]) -> str:
    """A list of rows as JSON: right ones, with some of their values put to others, or none."""
    if draw(st.integers(0, 4)) == 0:
        return str(draw(st.sampled_from(ODD_TEXTS)))
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        row = dict(good)
        for name in draw(st.lists(st.sampled_from(sorted(good)), max_size=2)):
            row[name] = draw(JSON)
        if draw(st.integers(0, 4)) == 0:
            del row[draw(st.sampled_from(sorted(row)))]
        rows.append(draw(JSON) if draw(st.integers(0, 9)) == 0 else row)
    return json.dumps(rows)


MEASURED = {"bench": "overlap", "precision": "bf16", "exchange_ms": 1.0, "ep": 2, "graph": False}
MEASURED |= {"dims": {"tokens": 8192, "topk": 8, "hidden": 7168}, "hidden_share": 0.5}
MEASURED |= {"dispatcher": "alltoall", "schedule": "serial"}


def test_measured_rows_of_plan(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"

    @drawn(150)
    @given(damaged(MEASURED))
    def check(text: str) -> None:
        path.write_text(text)
        try:
            found = read_measured(path, Traffic(8192, 8, 7168, 256))
        except ConfigError:
            return
        assert all(row.exchange_ms > 0 and row.hidden_share <= 1 for row in found)

    check()


def test_rows_of_bench_that_are_read_back(tmp_path: Path) -> None:
    """What is accepted can be merged, printed and drawn."""
    from ep_plugin.commands.bench import plot
    from ep_plugin.commands.bench.best import both_figures
    from ep_plugin.commands.bench.floors import H100

    path = tmp_path / "rows.json"
    good = figures.make_row(torch.device("cpu"), Timing(1.0, 1.0, 1.0), bench="gemm", shape="tiny")
    good |= {"op": "fc1", "backend": "torch", "precision": "bf16", "routing": "balanced"}
    good |= {"floor_ms": 1.0, "rates": H100.facts(), "switches": "--a"}

    @drawn(150)
    @given(damaged(good))
    def check(text: str) -> None:
        path.write_text(text)
        try:
            rows = figures.read(path)
        except ConfigError:
            return
        figures.table(figures.merge(rows, rows))
        both_figures(rows)
        plot.draw(rows)

    check()


def test_prompts(tmp_path: Path) -> None:
    path = tmp_path / "prompts.json"

    @drawn(100)
    @given(st.one_of(JSON.map(json.dumps), st.sampled_from(ODD_TEXTS), st.just("[[1, 2], [3]]")))
    def check(text: str) -> None:
        path.write_text(text)
        try:
            prompts = read_prompts(path, None)
        except ConfigError:
            return
        assert all(type(token) is int and token >= 0 for prompt in prompts for token in prompt)

    check()
    path.write_text(json.dumps([[1]] * 5000))
    with pytest.raises(ConfigError, match="has 5000 prompts"):
        read_prompts(path, None)


def test_a_tokenizer_that_is_damaged(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "prompts.txt").write_text("a prompt\n")
    no_tokenizer = "has no tokenizer that transformers can load"
    cases = {"tokenizer.json": ("{", no_tokenizer), "tokenizer_config.json": ("[1]", "no JSON obj")}
    for name, (text, said) in cases.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text(text)
        with pytest.raises(ConfigError, match=said):
            read_prompts(tmp_path / "prompts.txt", folder)


def test_what_is_no_sentence_piece_model_leaves_no_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers gives it to tiktoken, which keeps what it reads in the temporary folder."""
    pytest.importorskip("transformers")
    pytest.importorskip("tiktoken")
    folder, temporary = tmp_path / "model", tmp_path / "tmp"
    for each in (folder, temporary):
        each.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    (folder / "tokenizer.model").write_text("no model\n")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    (tmp_path / "prompts.txt").write_text("a prompt\n")
    with pytest.raises(ConfigError, match="has no tokenizer that transformers can load"):
        read_prompts(tmp_path / "prompts.txt", folder)
    assert list(temporary.iterdir()) == []
    assert "TIKTOKEN_CACHE_DIR" not in os.environ


DAMAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:20]),
    "other bytes": lambda path: path.write_bytes(os.urandom(5000)),
    "nested": lambda path: path.write_bytes(b"[" * 100_000),
    "a list": lambda path: path.write_text("[1]"),
    "markup": lambda path: path.write_text(
        json.dumps(dict.fromkeys(("seconds", "peak_rss_bytes", "logits_max_abs_diff"), MARKUP))
        + "\non validation set | lm loss value: " + MARKUP
    ),
    "not a number": lambda path: path.write_text(
        '{"seconds": NaN, "peak_rss_bytes": 1e999}\non validation set | lm loss value: nan'
    ),
    "huge number": lambda path: path.write_text(
        '{"seconds": 1' + "0" * 5000 + "}\non validation set | lm loss value: 1" + "0" * 5000
    ),
    "gone": lambda path: path.unlink(),
    "a link to nothing": lambda path: (path.unlink(), path.symlink_to("nowhere")),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_files_of_a_quickstart_s_report(damage: str, quickstart: Path) -> None:  # noqa: F811
    files = [
        *("converted/parity.json", "logs/evaluate-moe.log", "logs/evaluate-moe.usage.json"),
        *(path.relative_to(quickstart) for path in quickstart.glob("tensorboard/moe/*")),
    ]
    for file in files:
        there = quickstart / file
        before = there.read_bytes()
        DAMAGE[damage](there)
        ended = hostile.run(["report", "--run", str(quickstart)])
        assert not ended.fault, (file, ended.fault)
        assert ended.code == 2 or (damage == "gone" and "usage" in str(file)), file
        assert (quickstart / "report.html").exists() == (ended.code == 0)
        (quickstart / "report.html").unlink(missing_ok=True)
        there.rmdir() if there.is_dir() else there.unlink(missing_ok=True)
        there.write_bytes(before)


def test_a_report_of_odd_values_and_names(tmp_path: Path) -> None:
    """Markup is text, links are not written through, and what cannot be drawn is left out."""
    folder = tmp_path / f"run {MARKUP.replace('/', '')}\nline"
    with SummaryWriter(str(folder / "tensorboard")) as writer:
        for step, value in enumerate((1.0, math.nan, math.inf, 3e38, -3e38)):
            writer.add_scalar(TRAIN, value, step)
            writer.add_scalar(MARKUP, value, step)
            writer.add_scalar("ep/tokens_per_expert/layer_1/expert_0", value, 2 * step)
            writer.add_scalar("ep/tokens_per_expert/layer_1/expert_7", value, 2 * step + 1)
            writer.add_scalar("ep/tokens_per_expert/layer_99999999999/expert_5", value, step)
    (folder / "train.log").write_text("iteration 1/ 2 | " + "x" * 100_000 + "\n")
    (folder / "pipe.log").touch()
    (folder / "pipe.log").unlink()
    os.mkfifo(folder / "pipe.log")
    (folder / "report").mkdir()
    (folder / "report" / "report.html").symlink_to(tmp_path / "elsewhere")
    ended = hostile.run(["report", "--run", str(folder), "--device", MARKUP])
    assert (ended.code, ended.fault) == (0, "")
    page = (folder / "report" / "report.html").read_text()
    assert "<script" not in page
    assert not (tmp_path / "elsewhere").exists()
    json.loads((folder / "report" / "summary.json").read_text(), parse_constant=pytest.fail)
    shutil.rmtree(folder / "report")
    (tmp_path / "target").mkdir()
    (folder / "report").symlink_to(tmp_path / "target")
    ended = hostile.run(["report", "--run", str(folder)])
    assert (ended.code, ended.fault) == (2, "")
    assert "is a link to another place; use --to FOLDER" in ended.err
    assert not list((tmp_path / "target").iterdir())


@drawn(150)
@given(st.text(max_size=200), st.sampled_from(("1", "1" * 5000, "x", "")))
def test_a_log_of_any_text(text: str, iteration: str) -> None:
    path = Path("any.log")
    path.write_text(
        f"iteration {iteration}/ 2 | {text}: 1.2.3 | lm loss: nan | {text}\n{text}",
        errors="replace",
    )
    has_iterations(path)
    for tag, series in read_log(path).items():
        assert isinstance(tag, str)
        assert all(isinstance(value, float) for value in series.values())


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(tmp_path)
    yield
    os.chdir(before)


def test_experts_that_share_no_iteration_are_drawn_with_gaps() -> None:
    run = Run({
        "ep/tokens_per_expert/layer_1/expert_0": [(1, 0.5), (3, 0.5)],
        "ep/tokens_per_expert/layer_1/expert_1": [(2, 0.25)],
    })  # fmt: skip
    (image,) = shares_figure(run.shares()).axes[0].get_images()
    drawn = image.get_array().filled(-1.0).tolist()
    assert drawn == [[0.5, -1.0, 0.5], [-1.0, 0.25, -1.0]]


@pytest.mark.parametrize(
    "source",
    [b"a\0b", b"\xff\xfe", b"(" * 200_000, b"-" * 200_000 + b"1", b"x" * (2 << 20), b"if 1:\n"],
)
@pytest.mark.parametrize("flag", [[], ["--revert"], ["--diff"]])
def test_scripts_that_are_no_python(source: bytes, flag: list[str], tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_bytes(source)
    ended = hostile.run(["apply", *flag, str(script)])
    assert (ended.code, ended.fault) == (2, "")
    assert script.read_bytes() == source


def test_recipes_are_not_written_through_links(tmp_path: Path) -> None:
    folder = tmp_path / "copies"
    (folder / "recipes").mkdir(parents=True)
    (folder / "recipes" / "run.sh").symlink_to(tmp_path / "elsewhere")
    ended = hostile.run(["recipes", "--copy", str(folder), "qwen3-nano"])
    assert (ended.code, ended.fault) == (2, "")
    assert "is not overwritten" in ended.err
    assert not (tmp_path / "elsewhere").exists()


def call(command: str) -> subprocess.CompletedProcess[str]:
    """Run a command of a shell, in which ep-plugin is this checkout's."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = f'ep-plugin() {{ "{sys.executable}" -m ep_plugin.cli "$@"; }}; {command}'
    return subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, env=environment, check=False
    )


def only_sentence(text: str) -> str:
    lines = text.splitlines()
    assert len(lines) == 1, text
    return lines[0]


def test_a_full_disk_is_named_and_nothing_half_written_is_left(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: root meets no other."""
    (tmp_path / "plan.png").write_bytes(b"before")
    done = call("ulimit -f 1; ep-plugin plan --plot plan.png")
    assert done.returncode == 2
    sentence = only_sentence(done.stderr)
    assert sentence.startswith(
        "ep-plugin plan: error: plan.png cannot be written (File too large, "
    )
    assert "on the disk at /" in sentence
    assert (tmp_path / "plan.png").read_bytes() == b"before"
    done = call("ulimit -f 1; ep-plugin recipes --copy copies")
    assert (done.returncode, list(tmp_path.rglob("*.*"))) == (2, [tmp_path / "plan.png"])
    assert "cannot be written (File too large, on the disk at" in only_sentence(done.stderr)


def test_the_figures_of_a_bench_are_printed_before_they_are_lost(tmp_path: Path) -> None:
    row = figures.make_row(torch.device("cpu"), Timing(1.0, 1.0, 1.0), bench="gemm", shape="tiny")
    row |= {
        "op": "fc1",
        "backend": "torch",
        "precision": "bf16",
        "routing": "half",
        "floor_ms": 1.0,
    }
    (tmp_path / "rows.json").write_text(json.dumps([row] * 4))
    done = call(
        "ulimit -f 0; ep-plugin bench gemm --shapes tiny --precision bf16 --backends ep_plugin "
        "--repeats 1 --warm 0 --output rows.json"
    )
    assert done.returncode == 2
    assert "gemm tiny, balanced" in done.stdout
    assert "rows.json cannot be written" in done.stderr.splitlines()[-1]
    assert json.loads((tmp_path / "rows.json").read_text()) == [row] * 4


@pytest.mark.parametrize("command", ["presets", "--help", "plan --help", "recipes --json"])
def test_an_output_that_is_full_or_closed(command: str) -> None:
    done = call(f"ep-plugin {command} > /dev/full")
    assert done.returncode == 2
    assert "the output cannot be written (No space left on device)" in only_sentence(done.stderr)
    done = call(f"ep-plugin {command} | head -0")
    assert done.stderr == ""


def test_ctrl_c_and_a_mistake_of_ours(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def end(args: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(presets_command, "run", end)
    assert main(["presets"]) == 130
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(presets_command, "run", lambda args: 1 // 0)
    assert main(["presets"]) == 70
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-2].startswith("ZeroDivisionError")
    assert "this is a mistake of ep-plugin, not of yours; please report" in lines[-1]
    monkeypatch.setattr(presets_command, "run", lambda args: Path("/nowhere/x").read_text())
    assert main(["presets"]) == 2
    assert "/nowhere/x cannot be read or written (No such file" in capsys.readouterr().err


def test_a_file_is_written_whole_and_keeps_links_and_modes(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    target.chmod(0o640)
    link.symlink_to(target)
    write_whole(link, "new")
    assert (link.is_symlink(), target.read_text(), target.stat().st_mode & 0o777) == (
        *(True, "new", 0o640),
    )
    write_whole(link, "own", follow=False)
    assert (link.is_symlink(), link.read_text(), target.read_text()) == (False, "own", "new")
    write_whole(Path("/dev/null"), "gone")
    assert Path("/dev/null").is_char_device()
    write_whole(tmp_path / "a" / "b", "below")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b", "link", "target"]


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a disk below /dev")
def test_a_disk_below_dev_is_one_as_any_other() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        path = Path(folder) / "new" / "x.html"
        check_place(path)
        write_whole(path, "x")
        assert path.read_text() == "x"
        blocked = path / "below"
        with pytest.raises(ConfigError):
            check_place(blocked)


@pytest.mark.parametrize("name", ["target/below", "folder", "x" * 300, "pipe", "\udc80" * 300])
def test_a_place_that_cannot_be_written_to_is_refused_before_the_work(
    name: str, tmp_path: Path
) -> None:
    (tmp_path / "target").touch()
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for refuse in (check_place, lambda path: write_whole(path, "x")):
        with pytest.raises(ConfigError):
            refuse(tmp_path / name)
    assert {path.name for path in tmp_path.iterdir()} == {"target", "folder", "pipe"}
