"""A save that fails removes what it made itself, and nothing that is or may become whole."""

import errno
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.api import CheckpointException

from ep_plugin.megatron.arguments import not_saved
from ep_plugin.megatron.seams import failed_save
from ep_plugin.megatron.seams.failed_save import Begun

TRACKER = "latest_checkpointed_iteration.txt"
FULL = OSError(errno.ENOSPC, "No space left on device")
OF_A_WORKER = CheckpointException("write", {1: (FULL, None)})
OF_AN_EXCHANGE = RuntimeError("Connection closed by peer")


def made(root: Path, iteration: int, whole: bool) -> Path:
    folder = root / f"iter_{iteration:07d}"
    folder.mkdir(parents=True)
    (folder / "__0_0.distcp").write_text("data")
    if whole:
        (folder / ".metadata").write_text("of it")
    return folder


def fail(saves: list[Begun], error: BaseException) -> None:
    with pytest.raises((SystemExit, RuntimeError)), failed_save._told(saves):
        raise error


@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 5), named=st.integers(0, 5), lost=st.booleans(), data=st.data())
def test_of_saves_that_overlap_the_one_that_failed_goes(
    count: int,
    named: int,
    lost: bool,
    data: st.DataObject,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Those before it are whole, named or not; the tracker may have lost its words."""
    root = tmp_path_factory.mktemp("saves")
    named = min(named, count - 1)
    failed = data.draw(st.integers(named, count - 1))
    saves = [Begun(root, 100 * (n + 1), False, None) for n in range(count)]
    for n, begun in enumerate(saves):
        made(root, begun.iteration, whole=n < failed)
    if named or lost:
        (root / TRACKER).write_text("" if lost else str(100 * named))
    fail(saves, OF_A_WORKER)
    assert [begun.iteration for begun in saves if begun.folder.exists()] == [
        begun.iteration for begun in saves if begun is not saves[failed]
    ]
    kept = failed if lost else named
    assert not_saved.newest(root) == (str(100 * kept) if kept else None)


def test_what_is_whole_or_no_newer_than_the_tracker_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second is one that a run saves which began at an earlier iteration than the newest."""
    (tmp_path / TRACKER).write_text("200")
    for iteration, whole in ((300, True), (100, False)):
        folder = made(tmp_path, iteration, whole)
        fail([Begun(tmp_path, iteration, False, "200")], FULL)
        assert folder.exists()
        said = capsys.readouterr().err
        assert f"iteration {iteration} is not saved: " in said
        assert f"; {folder} may be half-written, and stays; " in said
    assert (tmp_path / TRACKER).read_text() == "200"


@pytest.mark.parametrize(
    ("rank", "error", "goes"),
    [
        ("0", OF_A_WORKER, True),
        ("0", FULL, True),
        ("0", OF_AN_EXCHANGE, False),
        ("1", OF_A_WORKER, False),
        ("1", FULL, False),
        ("2", OF_AN_EXCHANGE, False),
    ],
)
def test_only_rank_0_removes_and_after_an_exchange_nobody_does(
    rank: str,
    error: BaseException,
    goes: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another rank may be just about to name the folder: its tracker is empty for a moment."""
    monkeypatch.setenv("RANK", rank)
    (tmp_path / TRACKER).write_text("")
    folder = made(tmp_path, 8, whole=False)
    fail([Begun(tmp_path, 8, False, "4")], error)
    assert folder.exists() is not goes
    assert (tmp_path / TRACKER).read_text() == ("4" if goes else "")
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    unsure = rank != "0" and error is OF_AN_EXCHANGE
    assert f"iteration 8 {'may not be' if unsure else 'is not'} saved: " in said
    assert (f"; {folder} may be half-written, and stays" in said) is not goes


def test_a_save_that_is_named_is_forgotten_while_later_ones_are_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = SimpleNamespace(save=str(tmp_path), async_save=True)
    megatron = SimpleNamespace(get_args=lambda: args, is_empty_async_queue=lambda: False)
    monkeypatch.setattr(failed_save.importlib, "import_module", lambda name: megatron)
    told: list[list[int]] = []
    inner = failed_save._told
    monkeypatch.setattr(
        failed_save, "_told", lambda s: (told.append([b.iteration for b in s]), inner(s))[1]
    )
    patches = Mock()
    failed_save.changes(patches)
    (_, with_save, _), (_, with_finalize, _) = [c.args for c in patches.wrap.call_args_list]
    for iteration in (100, 200, 300):
        with_save(lambda iteration: None, iteration)
    with_finalize(lambda: (tmp_path / TRACKER).write_text("200"))
    with_finalize(lambda: None)
    assert told[-2:] == [[100, 200, 300], [300]]
