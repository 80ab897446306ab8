"""A training run connects to its own ranks and to nothing else."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from loop import MODEL, MOE, OURS, SCRIPT
from network import Watched

pytestmark = [pytest.mark.megatron, pytest.mark.newest]
RANKS = 2
ITERATIONS = ("--train-iters", "2", "--save-interval", "2", "--no-save-rng")


def test_two_ranks_train_and_save_without_any_other_connection(tmp_path: Path) -> None:
    """With TensorBoard. No name is looked up but that of this machine, which gloo asks for."""
    network = Watched(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    folders = [
        *("--save", str(tmp_path / "save")),
        *("--tensorboard-dir", str(tmp_path / "events")),
    ]
    flags = [*MODEL, *MOE, "--expert-model-parallel-size", "2", *ITERATIONS, *folders]
    common = {**os.environ, **network.environment(), "EP_PLUGIN_DEVICE": "cpu", "WORLD_SIZE": "2"}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            [*network.traced(f"strace-{rank}"), sys.executable, *OURS, SCRIPT, *flags],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(RANKS)
    ]
    said = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said[0][-3000:]
    assert (tmp_path / "save" / "latest_checkpointed_iteration.txt").read_text() == "2"
    assert any((tmp_path / "events").glob("*tfevents*"))
    assert network.others() == []


def test_other_connections_would_be_seen(tmp_path: Path) -> None:
    """By the hook, for Python; and by strace, where it is, for native code."""
    network = Watched(tmp_path)
    # 192.0.2.1 is nobody's: it is for documentation
    code = "import socket; s = socket.socket(); s.settimeout(0.1); s.connect(('192.0.2.1', 9))"
    command = [*network.traced(), sys.executable, "-c", code]
    environment = {**os.environ, **network.environment()}
    assert subprocess.run(command, env=environment, capture_output=True, check=False).returncode
    assert len(network.others()) == 1
    del environment["EP_TEST_NETWORK"]
    subprocess.run(command, env=environment, capture_output=True, check=False)
    assert len(network.others()) == 1 + bool(network.traced())
