"""A refused run under torchrun: our sentence first, and again at the end of torchrun's report."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from ep_plugin.errors import ConfigError
from ep_plugin.megatron.seams.for_torchrun import ERROR_FILE, leave_for_torchrun
from ep_plugin.megatron.seams.refusal import refuse

SENTENCE = "SCRIPT must be a Python file; got 'missing.py', which does not exist here"


def test_torchrun_ends_its_report_with_the_sentence(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", "-m", "ep_plugin.run", "missing.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    said = done.stderr
    assert said.count(f"ep_plugin.run: error: {SENTENCE}") == 1
    assert said.index(SENTENCE) < said.index("torch/distributed/elastic")
    last = [line for line in said.splitlines() if not line.startswith("===")][-1]
    assert last.startswith(f"  traceback : {SENTENCE}")
    assert "To enable traceback see" not in said.partition("Root Cause")[2]


@pytest.mark.parametrize("rank", ["0", "1"])
def test_every_rank_that_is_refused_leaves_it(
    rank: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun shows the rank that it saw end first, whichever that is."""
    file = tmp_path / "error.json"
    monkeypatch.setenv("RANK", rank)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv(ERROR_FILE, str(file))
    with pytest.raises(SystemExit):
        refuse(ConfigError('--a "1" is wrong; use 2'))
    shown = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(file))
    told = shown.error_file_data["message"]
    assert told["extraInfo"]["py_callstack"] == '--a "1" is wrong; use 2'
    assert shown.timestamp > 0


def test_nothing_is_left_without_torchrun_and_a_full_disk_is_no_second_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(ERROR_FILE, raising=False)
    leave_for_torchrun("a")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv(ERROR_FILE, str(tmp_path / "none" / "error.json"))
    leave_for_torchrun("b")
    monkeypatch.setenv(ERROR_FILE, str(tmp_path / "error.json"))
    leave_for_torchrun("c")
    assert json.loads((tmp_path / "error.json").read_text())["message"]["message"] == "c"
