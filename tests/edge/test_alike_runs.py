"""Real ranks: what differs ends them with one sentence, what may differ changes nothing."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from loop import MOE, OURS, ROOT, RUN, SCRIPT, SHAPE
from warm import Done, run_script

from ep_plugin.megatron.arguments.digest import OWN, PLACES
from ep_plugin.megatron.arguments.table import TYPED

pytestmark = [pytest.mark.megatron]
UNLIKE = str(ROOT / "tests" / "helpers" / "unlike.py")


def command(
    words: list[str], *flags: str, rank: int = 1, **variables: str
) -> tuple[dict[str, str], list[str]]:
    """Return environment and arguments of Python of ranks, one of them with `words` of its own."""
    environment = {
        **{**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        **{"UNLIKE": json.dumps(words), "UNLIKE_RANK": str(rank), "UNLIKE_SCRIPT": SCRIPT},
        **variables,
    }
    layout = ("--expert-model-parallel-size", "2", "--train-iters", "2")
    return environment, [*OURS, UNLIKE, *SHAPE, *RUN, *MOE, *layout, *flags]


def run(words: list[str], *flags: str, rank: int = 1, **variables: str) -> Done:
    """Run two ranks, one of them with `words` of its own."""
    environment, argv = command(words, *flags, rank=rank, **variables)
    return run_script(2, argv, environment)


def losses(done: Done) -> list[str]:
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return re.findall(r"lm loss: (\S+).*?grad norm: (\S+)", done.stdout)


def test_a_setting_that_trained_on_in_silence_ends_both_ranks() -> None:
    done = run(["--lr", "5e-2"])
    assert done.returncode == 1
    assert "the ranks must be alike in --lr (rank 0 has 0.003, rank 1 has 0.05)" in done.stderr
    assert "Traceback" not in done.stderr
    assert not re.search(r"iteration +1/", done.stdout)


def test_a_group_that_was_made_before_is_compared_too() -> None:
    done = run(["group first", "--seed", "8"])
    assert done.returncode == 1
    assert "alike in --seed (rank 0 has 7, rank 1 has 8)" in done.stderr


@pytest.mark.newest
@pytest.mark.parametrize("rank", [0, 1])
def test_a_mistake_on_one_rank_is_told_to_the_other(rank: int) -> None:
    done = run(["--ep-capacity-factor", "-1"], rank=rank)
    assert done.returncode in (1, 2)
    assert f"rank {rank} failed at the start: " in done.stderr
    assert "--ep-capacity-factor" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.newest
def test_an_error_on_one_rank_is_told_to_the_other() -> None:
    """Without torchrun: rank 0 keeps the store, and Python ends as it does."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    environment, argv = command(["raise"])
    ranks = [
        subprocess.Popen(
            [sys.executable, *argv],
            env=environment | world | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, 1]
    text = "rank 1 failed at the start: FileNotFoundError: no tokenizer on this host"
    assert f"ep_plugin: error: {text}" in said[0]
    assert "Traceback" in said[1]
    assert "Traceback" not in said[0]


@pytest.mark.newest
def test_a_mistake_of_all_ranks_is_said_once() -> None:
    done = run(["--log-interval", "1"], "--ep-capacity-factor", "-1")
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1


@pytest.mark.newest
def test_a_rank_that_does_not_come_is_named() -> None:
    done = run(["sleep"], EP_PLUGIN_START_TIMEOUT="2")
    assert done.returncode == 1
    assert "rank 1 did not come within 2 s" in done.stderr


AGAIN = str(ROOT / "tests" / "helpers" / "starts_again.py")


@pytest.mark.newest
@pytest.mark.parametrize("how", ["differ", "fails"])
def test_two_agents_start_again_and_may_count_that_otherwise(how: str, tmp_path: Path) -> None:
    environment, _ = command(["sleep"], STARTS=how, FOLDER=str(tmp_path), GLOO_SOCKET_IFNAME="lo")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    agents = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", AGAIN),
            ],
            env=environment
            | {
                "PET_NPROC_PER_NODE": "1",
                "PET_MAX_RESTARTS": "2",
                "PET_MONITOR_INTERVAL": "0.2",
                "PET_RDZV_BACKEND": "c10d",
                "PET_RDZV_ENDPOINT": f"localhost:{port}",
                "PET_RDZV_ID": "again",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(2)
    ]
    try:
        said = "".join(agent.communicate(timeout=120)[0] for agent in agents)
    finally:
        for agent in agents:
            agent.kill()
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert said.count("trains with seed 7: 2 ranks") == 2
    assert said.count("must be alike in args.seed") == (2 if how == "differ" else 0)
    # An agent counts a restart when its own rank ended first, not when it follows the other agent.
    # Where both ranks end it is a race which of them counts.
    read = ["".join((tmp_path / f"started_{rank}").read_text().split()) for rank in range(2)]
    if how == "fails":
        assert read == ["00", "01"]
    else:
        assert set(read) <= {"00", "01"}
        assert "01" in read


@pytest.mark.newest
def test_a_start_within_the_processes_of_one_that_failed_and_of_one_that_was_fine() -> None:
    environment, _ = command(["sleep"], STARTS="in process", GLOO_SOCKET_IFNAME="lo")
    done = run_script(2, [AGAIN], environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("trains with seed 7: 2 ranks") == 4
    assert done.stderr.count("must be alike in args.seed") == 2


# What may differ and does not in the run below, and why not. Files and folders that ranks read or
# write together may differ between hosts alone, and its ranks are of one: `test_alike.py`.
NOT_RUN = {
    "rank": "differs in every run",
    "local_rank": "differs in every run",
    TYPED: "differs with the words",
    "wandb_project": "needs wandb and an account",
    "config_logger_dir": "Megatron cannot write what it logs there: a process group",
    "moe_routing_trace_path": "traces Megatron's own router, which is not built",
}


@pytest.mark.newest
def test_what_may_differ_changes_no_loss(tmp_path: Path) -> None:
    places = {
        "--tensorboard-dir": "t",
        "--wandb-save-dir": "w",
        "--flight-recorder-dump-path": "f",
        "--non-persistent-local-ckpt-dir": "n",
        "--rl-profile-dir": "r",
    }
    given, other = (
        [word for flag, name in places.items() for word in (flag, f"{tmp_path}/{number}{name}")]
        for number in (1, 2)
    )
    other += ["--logging-level", "40", "--tensorboard-queue-size", "7", "--profile-ranks", "1"]
    other += ["--wandb-entity", "a", "--wandb-exp-name", "b"]
    other += ["--one-logger-project", "c", "--one-logger-run-name", "d"]
    other += ["--app-tag-run-name", "e", "--app-tag-run-version", "2"]
    other += ["--memory-snapshot-path", str(tmp_path / "snapshot")]
    named = {word[2:].replace("-", "_") for word in other if word.startswith("--")}
    assert named | NOT_RUN.keys() == OWN.keys() | PLACES.keys()
    plain, differing = run(["--log-interval", "1"], *given), run(other, *given)
    assert losses(plain) == losses(differing)
    assert len(losses(plain)) == 2
