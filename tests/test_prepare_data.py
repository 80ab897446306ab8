"""recipes/prepare_data.py: Megatron reads back what went in, and mistakes leave nothing."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.megatron
SCRIPT = Path(__file__).parents[1] / "recipes" / "prepare_data.py"
TEXTS = [
    "def f(x):\n\treturn x  # tabs, two  spaces\n\n" * 40,
    "  leading spaces, unicode: \u00e9\u4e2d\U0001f600 and a last line without newline" * 30,
    "".join(f"line {i} is {i * i}\n" for i in range(300)),
]
SMALL = ("--vocab-size", "400")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prepare_data", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "a.py").write_text(TEXTS[0])
    (source / "b.txt").write_text(TEXTS[1])
    lines = "".join(json.dumps({"body": text}) + "\n" for text in TEXTS[2:])
    (tmp_path / "lines.jsonl").write_text(lines)
    return source


def test_megatron_reads_the_very_text_back(
    script: ModuleType, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset  # noqa: TID251
    from megatron.core.tokenizers.text.libraries import SentencePieceTokenizer  # noqa: TID251

    output = tmp_path / "data"
    inputs = [str(folder), str(tmp_path / "lines.jsonl"), "--json-key", "body"]
    assert script.main([*inputs, "--output", str(output), *SMALL]) == 0
    data = IndexedDataset(str(output / "corpus"))
    tokenizer = SentencePieceTokenizer(str(output / "tokenizer.model"))
    assert len(data) == len(TEXTS)
    for document, text in zip(data, TEXTS, strict=True):
        *ids, last = document.tolist()
        assert last == tokenizer.eos_id
        assert tokenizer.tokenizer.decode(ids) == text
    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest["tokens"] == sum(len(document) for document in data)
    before = (output / "corpus.bin").stat().st_mtime_ns
    assert script.main([*inputs, "--output", str(output), *SMALL]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert (output / "corpus.bin").stat().st_mtime_ns == before


def test_mistakes_are_one_line_and_leave_nothing(
    script: ModuleType, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.txt").write_text(" \n")
    output = tmp_path / "out" / "data"
    jsonl = str(tmp_path / "lines.jsonl")
    for arguments, message in (
        ([str(tmp_path / "empty")], "INPUT must hold text"),
        ([str(tmp_path / "blank.txt")], "INPUT must hold text"),
        ([str(tmp_path / "gone")], "does not exist"),
        ([jsonl], "line 1 is not ('text'); --json-key names another key"),
        ([str(folder), "--vocab-size", "90000"], "--vocab-size (90000) does not fit the text"),
    ):
        assert script.main([*arguments, "--output", str(output)]) == 2
        lines = capsys.readouterr().err.splitlines()
        errors = [line for line in lines if line.startswith("prepare_data.py: error:")]
        assert len(errors) == 1
        assert message in errors[0]
        assert not list((tmp_path / "out").glob("*")) or not output.exists()
        assert not list(tmp_path.glob("out/.*"))


def test_another_output_is_not_overwritten(
    script: ModuleType, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "mine"
    output.mkdir()
    (output / "precious").write_text("kept")
    assert script.main([str(folder), "--output", str(output)]) == 2
    assert "holds something else" in capsys.readouterr().err
    assert [path.name for path in output.iterdir()] == ["precious"]
