"""The short form of `python tests/hostile`: real commands, watched, on files with hostile content.

One process makes the healthy folders, runs every command on them, and then on spoiled ones. It may
connect to nothing, and is watched for that from inside and, where strace is, from outside.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from network import Watched

from ep_plugin.cli import COMMANDS
from tests.hostile import trees

pytestmark = [pytest.mark.megatron, pytest.mark.newest]
ROOT = Path(__file__).parents[2]
CASES = 40


@dataclass(frozen=True)
class Ran:
    found: dict[str, Any]
    said: str
    network: Watched


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("hostile")
    network, result = Watched(folder), folder / "found.json"
    command = [sys.executable, "tests/hostile", "--commands", str(CASES), "--json", str(result)]
    done = subprocess.run(
        [*network.traced(), *command],
        cwd=ROOT,
        env={**os.environ, **network.environment(), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    said = done.stdout + done.stderr
    assert result.is_file(), said[-3000:]
    return Ran(json.loads(result.read_text())["commands"], said, network)


def test_nothing_runs_nothing_is_written_nothing_hangs(ran: Ran) -> None:
    assert sum(row["cases"] for row in ran.found["counts"].values()) == CASES
    assert ran.found["faults"] == []


def test_every_file_that_a_command_opens_is_planted_in_and_no_other(ran: Ran) -> None:
    """Against what an audit hook saw of `open` while commands ran on healthy folders."""
    for name, command in trees.COMMANDS.items():
        opened, patterns = ran.found["opened"][name], dict.fromkeys(command.files, 0)
        for file in opened:
            like = [pattern for pattern in patterns if fnmatch(file, pattern)]
            assert like, f"{name} opens {file}, which trees.py does not list"
            patterns.update({pattern: 1 for pattern in like})
        # memory is mapped, and these are read, by native code, which the hook does not see
        native = (".safetensors", "pieces/tokenizer.model")
        unseen = [p for p, seen in patterns.items() if not seen and not p.endswith(native)]
        assert unseen == [], f"{name} does not open these"


def test_every_command_is_among_them() -> None:
    listed = {command.argv[0] for command in (*trees.COMMANDS.values(), *trees.OTHERS.values())}
    assert {*listed, *trees.RUNS_A_SCRIPT} - {"flags", "teach"} == set(COMMANDS)


def test_commands_connect_to_nothing(ran: Ran) -> None:
    assert ran.network.others() == []
