"""`convert --check` and an unfinished conversion: whatever is changed of their files is seen."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ep_plugin.checkpoint.journal import open_journal
from ep_plugin.checkpoint.manifest import MANIFEST
from ep_plugin.cli import main
from ep_plugin.errors import ConfigError
from tests.commands.test_convert import convert, save_dense

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("written")
    save_dense(root / "dense")
    assert convert(root / "dense", root / "moe") == 0
    return root / "moe"


@pytest.fixture
def moe(written: Path, tmp_path: Path) -> Path:
    shutil.copytree(written, tmp_path / "moe")
    return tmp_path / "moe"


def check(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    """Return the exit code of --check, and the sentences on stderr."""
    capsys.readouterr()
    code = main(["convert", "--check", "--to", str(folder)])
    return code, capsys.readouterr().err.splitlines()


def refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    code, sentences = check(folder, capsys)
    assert code in (1, 2)
    assert sentences
    assert all(line.startswith("ep-plugin convert: ") for line in sentences)
    assert all(line.isprintable() and len(line) < 2000 for line in sentences)
    return "\n".join(sentences)


def changed(folder: Path, **sections: Any) -> None:
    """Write sections of the manifest anew."""
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | sections))


def test_what_was_written_is_fine(moe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(moe, capsys) == (0, [])


@pytest.mark.parametrize("key", ["files", "tensors"])
@pytest.mark.parametrize("value", [{}, [], None, 5, "files", [["a", {}]]])
def test_a_manifest_of_nothing_is_none(
    moe: Path, capsys: pytest.CaptureFixture[str], key: str, value: Any
) -> None:
    changed(moe, **{key: value})
    assert f"lists no {key}" in refused(moe, capsys)


def test_what_is_not_listed_is_named(moe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = json.loads((moe / MANIFEST).read_text())
    for key in ("files", "tensors"):
        for name in manifest[key]:
            rest = {other: entry for other, entry in manifest[key].items() if other != name}
            changed(moe, **(manifest | {key: rest}))
            assert name in refused(moe, capsys)
    changed(moe, **manifest)
    (moe / "more").mkdir()
    (moe / "more" / "link").symlink_to("/")
    assert "more/link is not in manifest.json" in refused(moe, capsys)


def test_nothing_outside_is_opened(moe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = json.loads((moe / MANIFEST).read_text())["files"]
    name, entry = next(iter(files.items()))
    outside = moe.parent / "outside"
    shutil.copy(moe / name, outside)
    for path in ("../outside", str(outside), "./" + name, f"iter_1/../../{outside.name}", "", "\0"):
        changed(moe, files={**files, path: entry})
        assert "is no file below it" in refused(moe, capsys)
    changed(moe, files=files)
    (moe / name).unlink()
    (moe / name).symlink_to(outside)
    assert "is a symbolic link" in refused(moe, capsys)
    (moe / name).unlink()
    shutil.move(moe / name.split("/")[0], moe.parent / "elsewhere") if "/" in name else None
    if "/" in name:
        (moe / name.split("/")[0]).symlink_to(moe.parent / "elsewhere")
        assert "is a symbolic link" in refused(moe, capsys)


@pytest.mark.parametrize("change", [{"dtype": "torch.int8"}, {"shape": [1]}, {"shape": None}])
def test_tensors_are_those_listed(
    moe: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any]
) -> None:
    tensors = json.loads((moe / MANIFEST).read_text())["tensors"]
    name = sorted(tensors)[0]
    changed(moe, tensors={**tensors, name: tensors[name] | change})
    assert f"tensor {name} is torch.float32" in refused(moe, capsys)


@QUICK
@given(data=st.data())
def test_any_damage_of_the_manifest_is_seen(
    written: Path,
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
    data: st.DataObject,
) -> None:
    """Where an entry is changed, taken out, or put in; what `settings` says binds nothing."""
    folder = tmp_path_factory.mktemp("damaged") / "moe"
    shutil.copytree(written, folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    section = manifest[data.draw(st.sampled_from(["files", "tensors"]))]
    name = data.draw(st.sampled_from(sorted(section)) | st.text(max_size=20))
    anything = st.recursive(
        st.none() | st.integers() | st.text(max_size=5) | st.booleans(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
        max_leaves=4,
    )
    known = section.get(name, {"num_bytes": 0, "sha256": "0" * 64})
    entry = data.draw(
        st.just("out") | anything | st.fixed_dictionaries({k: anything for k in known})
    )
    if entry == section.get(name):
        return
    section[name] = entry
    if entry == "out":
        section.pop(name)
        if (
            name not in json.loads((folder / MANIFEST).read_text())["tensors"]
            and name not in (json.loads((folder / MANIFEST).read_text())["files"])
        ):
            return
    (folder / MANIFEST).write_text(json.dumps(manifest))
    refused(folder, capsys)
    shutil.rmtree(folder.parent)


REQUEST = {"--from": "dense", "its files": {"a": [1, 2]}, "seed": 5}
RECORD = {
    "num_bytes": 3,
    "sha256": "0" * 64,
    "content": [{"name": "x", "chunks": [[[0], [1], 0, 3]]}],
}


def new_journal(folder: Path) -> Path:
    folder.mkdir()
    journal = open_journal(folder / "journal.jsonl", REQUEST)
    for name in ("a", "b"):
        journal.add(name, RECORD)
    return folder / "journal.jsonl"


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_damaged_journal_says_how_to_start_over_or_loses_its_last_lines(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = new_journal(tmp_path_factory.mktemp("journal") / ".moe.partial")
    good = path.read_bytes()
    begin = data.draw(st.integers(0, len(good) - 1))
    end = data.draw(st.integers(begin, len(good)) | st.just(begin + 1) | st.just(len(good)))
    new = data.draw(st.binary(max_size=4) | st.sampled_from([b"\n", b"null\n", b"[]\n", b"[{}]\n"]))
    damaged = good[:begin] + new + good[end:]
    path.write_bytes(damaged)
    try:
        done = open_journal(path, REQUEST).done
    except ConfigError as error:
        sentence = str(error)
        assert f"remove {path.parent} and repeat the command to start over" in sentence
    else:
        kept = damaged[: damaged.rfind(b"\n") + 1]  # a line without an end does not count
        assert [json.loads(line) for line in kept.splitlines()] == [
            json.loads(line) for line in good.splitlines()[: kept.count(b"\n")]
        ]
        assert done == dict.fromkeys(list("ab")[: max(kept.count(b"\n") - 1, 0)], RECORD)


def test_a_journal_of_another_version_says_how_to_start_over(tmp_path: Path) -> None:
    path = new_journal(tmp_path / ".moe.partial")
    path.write_text(json.dumps(REQUEST) + "\n")  # as releases before wrote it
    with pytest.raises(ConfigError, match=r"no JSON list; remove .* to start over"):
        open_journal(path, REQUEST)
    path = new_journal(tmp_path / ".other.partial")
    with pytest.raises(ConfigError, match="seed was 5 and is 6"):
        open_journal(path, REQUEST | {"seed": 6})
