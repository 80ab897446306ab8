"""recipes/prepare_data.py: Megatron reads back what went in, and mistakes leave nothing."""

import importlib.util
import itertools
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.megatron
SCRIPT = Path(__file__).parents[2] / "recipes" / "prepare_data.py"
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
    write_lines(tmp_path / "lines.jsonl", TEXTS[2:])
    return source


def write_lines(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))


def read_back(output: Path) -> list[str]:
    """Return the documents as Megatron reads them; each must be closed by end-of-sentence."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset  # noqa: TID251
    from megatron.core.tokenizers.text.libraries import SentencePieceTokenizer  # noqa: TID251

    tokenizer = SentencePieceTokenizer(str(output / "tokenizer.model"))
    documents = [document.tolist() for document in IndexedDataset(str(output / "corpus"))]
    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest["documents"] == len(documents)
    assert manifest["tokens"] == sum(map(len, documents))
    assert all(document.count(tokenizer.eos_id) == 1 for document in documents)
    assert all(document[-1] == tokenizer.eos_id for document in documents)
    return [tokenizer.tokenizer.decode(document[:-1]) for document in documents]


def test_megatron_reads_the_very_documents_back(
    script: ModuleType, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [f"{i}: {TEXTS[i % 3][-60:]}" for i in range(script.MIN_DOCUMENTS)]
    write_lines(tmp_path / "lines.jsonl", texts)
    output = tmp_path / "data"
    inputs = [str(folder), str(tmp_path / "lines.jsonl"), "--json-key", "body"]
    assert script.main([*inputs, "--output", str(output), *SMALL]) == 0
    assert read_back(output) == [*TEXTS[:2], *texts]
    before = (output / "corpus.bin").stat().st_mtime_ns
    assert script.main([*inputs, "--output", str(output), *SMALL]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert (output / "corpus.bin").stat().st_mtime_ns == before


def test_few_documents_are_cut_so_that_each_split_has_some(
    script: ModuleType, folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "data"
    inputs = [str(folder), str(tmp_path / "lines.jsonl"), "--json-key", "body"]
    assert script.main([*inputs, "--output", str(output), *SMALL]) == 0
    parts = read_back(output)
    assert len(parts) >= script.MIN_DOCUMENTS
    assert "".join(parts) == "".join(TEXTS)
    ends = set(itertools.accumulate(map(len, parts)))
    assert ends.issuperset(itertools.accumulate(map(len, TEXTS)))  # no part spans two documents


def test_lines_longer_than_sentencepiece_takes_train_the_tokenizer(
    script: ModuleType, tmp_path: Path
) -> None:
    words = " ".join(f"word{i * i % 9973}" for i in range(5000))
    assert len(words) > 4 * script.MAX_LINE
    (tmp_path / "one.txt").write_text(words)
    output = tmp_path / "data"
    assert script.main([str(tmp_path / "one.txt"), "--output", str(output), *SMALL]) == 0
    assert "".join(read_back(output)) == words
    tokens = json.loads((output / "manifest.json").read_text())["tokens"]
    assert tokens < 0.7 * len(words)  # "word" at least is one token


def test_blank_lines_are_passed_over_and_inputs_may_lie_in_site_packages(
    script: ModuleType, tmp_path: Path
) -> None:
    source = tmp_path / "site-packages" / "mine"
    (source / "site-packages").mkdir(parents=True)
    (source / "site-packages" / "installed.txt").write_text("not the user's text")
    write_lines(source / "a.jsonl", TEXTS[:1])
    with (source / "a.jsonl").open("a") as lines:
        lines.write("\n  \n" + json.dumps({"body": TEXTS[2]}))
    files = script.list_files([source])
    assert files == [source / "a.jsonl"]
    assert script.read_all(files, "body") == [TEXTS[0], TEXTS[2]]


def test_changed_text_of_the_same_size_is_other_data(script: ModuleType, folder: Path) -> None:
    before = script.fingerprint(script.list_files([folder]))
    (folder / "a.py").write_text(TEXTS[0].replace("x", "y"))
    assert script.fingerprint(script.list_files([folder])) != before


def test_mistakes_are_one_line_and_leave_nothing(
    script: ModuleType, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.txt").write_text(" \n")
    output = tmp_path / "out" / "data"
    jsonl = str(tmp_path / "lines.jsonl")

    def bad(name: str, line: bytes) -> str:
        path = tmp_path / f"{name}.jsonl"
        path.write_bytes(b'{"text": "good"}\n' + line + b"\n")
        return str(path)

    for arguments, message in (
        ([str(tmp_path / "empty")], "INPUT must hold text"),
        ([str(tmp_path / "blank.txt")], "INPUT must hold text"),
        ([str(tmp_path / "gone")], "does not exist"),
        ([jsonl], "line 1 of {jsonl} is not (no such key); --json-key names another key"),
        ([bad("null", b'{"text": null}')], "line 2 of {bad} is not (NoneType under that key)"),
        ([bad("list", b"[1]")], "line 2 of {bad} is not (list indices"),
        ([bad("latin", b'{"text": "\xe9"}')], "line 2 of {bad} is not ('utf-8' codec can't decode"),
        (
            [bad("half", b'{"text": "\\ud800"}')],
            "line 2 of {bad} is not ('utf-8' codec can't encode",
        ),
        ([bad("cut", b'{"text": "a')], "line 2 of {bad} is not (Invalid control character"),
        ([str(folder), "--vocab-size", "90000"], "--vocab-size (90000) does not fit the text; "),
        ([str(folder), "--vocab-size", "10"], "--vocab-size (10) does not fit the text; "),
        ([str(folder), "--vocab-size", "0"], "--vocab-size must be at least 1; got 0"),
    ):
        assert script.main([*arguments, "--output", str(output)]) == 2
        lines = capsys.readouterr().err.splitlines()
        errors = [line for line in lines if line.startswith("prepare_data.py: error:")]
        assert len(errors) == 1
        assert message.format(jsonl=jsonl, bad=arguments[0]) in errors[0]
        assert not (tmp_path / "out").exists()
        assert not list(tmp_path.glob(".*"))


def test_the_vocabulary_that_would_do_does(
    script: ModuleType, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, wrong in enumerate(("10", "90000")):
        output = ["--output", str(tmp_path / f"data{number}")]
        assert script.main([str(folder), *output, "--vocab-size", wrong]) == 2
        found = re.search(r"; use --vocab-size (\d+)", capsys.readouterr().err)
        assert found is not None
        assert script.main([str(folder), *output, "--vocab-size", found[1]]) == 0


def test_another_output_is_not_overwritten(
    script: ModuleType, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "mine"
    output.mkdir()
    (output / "precious").write_text("kept")
    assert script.main([str(folder), "--output", str(output)]) == 2
    assert "holds something else" in capsys.readouterr().err
    assert [path.name for path in output.iterdir()] == ["precious"]


def test_an_output_inside_a_file_is_refused(
    script: ModuleType, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("kept")
    assert script.main([str(folder), "--output", str(tmp_path / "file" / "data")]) == 2
    assert "--output must lie in a folder; " in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "kept"
