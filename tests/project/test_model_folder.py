"""recipes/run.sh with a model in a folder: its flags are data, its schedule is fine-tuning's."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUN = ROOT / "recipes" / "run.sh"
SBATCH = ROOT / "recipes" / "slurm" / "pretrain.sbatch"
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
FLAGS = ["schedule=finetune", "--num-layers", "2", "--swiglu", "--padded-vocab-size", "512"]
TRACKER = "latest_checkpointed_iteration.txt"


def model(folder: Path, lines: list[str] | None = None) -> Path:
    """Make what `convert` leaves, as far as the launcher looks at it."""
    folder.mkdir(parents=True)
    (folder / "flags.txt").write_text("".join(f"{line}\n" for line in lines or FLAGS))
    (folder / TRACKER).write_text("release")
    return folder


def launch(
    folder: Path, *words: str, script: Path = RUN, **settings: str
) -> subprocess.CompletedProcess[str]:
    """Run a launcher in `folder`; torchrun stands for the real one, and notes its words there."""
    tools = folder / "tools"
    tools.mkdir(exist_ok=True)
    (folder / "pretrain.py").touch()
    for name in ("torchrun", "srun"):
        (tools / name).write_text(f'#!/bin/sh\necho "$@" >>{folder}/{name}.calls\n')
        (tools / name).chmod(0o755)
    environment = {"PATH": f"{tools}:{PATH}", "PYTHONPATH": str(ROOT), "LAYOUT": "ep2"}
    return subprocess.run(
        ["bash", str(script), "pretrain.py", *words],
        env={**environment, "SLURM_SUBMIT_DIR": str(ROOT), **settings},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def words(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout.replace("\\\n", ""), comments=True)


def value(found: list[str], flag: str) -> str | None:
    return found[found.index(flag) + 1] if flag in found else None


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    assert (done.returncode, done.stdout) == (2, ""), done.stdout
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: ")
    return done.stderr.removeprefix("error: ").strip()


def test_a_folder_is_a_model(tmp_path: Path) -> None:
    """Its flags as they are, from its weights, with fine-tuning's schedule; so under Slurm."""
    folder = model(tmp_path / "my moe")
    for script in (RUN, SBATCH):
        found = words(
            launch(tmp_path, "--lr", "3e-6", script=script, DRY_RUN="1", MODEL=str(folder))
        )
        found = found[found.index("torchrun") :]
        place = found.index("--num-layers")
        assert found[place : place + 5] == FLAGS[1:]
        assert value(found, "--load") == str(folder)
        assert "--finetune" in found
        assert value(found, "--vocab-size") == "511"
        assert (value(found, "--train-iters"), value(found, "--lr")) == ("1000", "1e-5")
        assert found[-2:] == ["--lr", "3e-6"]
        assert value(found, "--save") == "runs/my moe-ep2/checkpoints"
    found = words(launch(tmp_path, MODEL="./my moe", DRY_RUN="1", SCHEDULE="own"))
    assert value(found, "--load") == "./my moe"
    assert "--lr" not in found


@pytest.mark.parametrize(
    "lines",
    [
        [*FLAGS, "--hidden-size", "$(touch planted)"],
        [*FLAGS, "--hidden-size", "`touch planted`"],
        [*FLAGS, "touch planted"],
        ["touch planted", *FLAGS],
        ["schedule=finetune; touch planted", *FLAGS[1:]],
        [*FLAGS, "--hidden-size", "a[$(touch planted)]"],
        [*FLAGS, "--padded-vocab-size", "x[$(touch planted)]"],
        [*FLAGS, "--tensorboard-dir", "planted"],
        [*FLAGS, "--ep-router", "my_package.my_router"],
    ],
    ids=lambda lines: next(line for line in reversed(lines) if line not in FLAGS),
)
def test_what_is_planted_in_flags_txt_does_not_run(lines: list[str], tmp_path: Path) -> None:
    """Nor in the file that keeps a run's schedule. Nothing is started, nothing is written."""
    folder = model(tmp_path / "moe", lines)
    before = sorted([*tmp_path.rglob("*"), tmp_path / "tools", tmp_path / "pretrain.py"])
    before += [tmp_path / "tools" / name for name in ("srun", "torchrun")]
    message = refusal(launch(tmp_path, MODEL=str(folder)))
    assert "flags.txt" in message
    assert sorted(before) == sorted(tmp_path.rglob("*"))
    run = tmp_path / "runs" / "qwen3-nano-ep2"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / TRACKER).write_text("7")
    (run / "schedule.txt").write_text("\n".join(lines))
    assert "schedule.txt" in refusal(launch(tmp_path, MODEL="qwen3-nano"))
    assert not list(tmp_path.rglob("*planted*")) + list(tmp_path.glob("*.calls"))


def test_a_number_that_bash_would_compute_is_only_a_number(tmp_path: Path) -> None:
    folder = model(tmp_path / "moe", [*FLAGS[:-1], "planted"])
    found = launch(tmp_path, MODEL=str(folder), DRY_RUN="1", planted="x[$(touch gone)]")
    assert "--padded-vocab-size" in refusal(found)
    assert not (tmp_path / "gone").exists()


def test_a_run_keeps_the_schedule_it_began_with(tmp_path: Path) -> None:
    """Begun with LOAD, it goes on without it; begun from nothing, it goes on pretraining."""
    trained = model(tmp_path / "moe")
    settings = {"MODEL": "qwen3-nano", "RUN_DIR": "run"}
    assert launch(tmp_path, **settings, LOAD=str(trained)).returncode == 0
    call = (tmp_path / "torchrun.calls").read_text().split()
    assert value(call, "--lr") == "1e-5"
    kept = (tmp_path / "run" / "schedule.txt").read_text().split()
    assert kept[0] == "schedule=finetune"
    (tmp_path / "run" / "checkpoints").mkdir(exist_ok=True)
    (tmp_path / "run" / "checkpoints" / TRACKER).write_text("7")
    found = words(launch(tmp_path, **settings, DRY_RUN="1"))
    assert value(found, "--load") == "run/checkpoints"
    assert "--finetune" not in found
    place = found.index(kept[1])
    assert found[place : place + len(kept) - 1] == kept[1:]
    message = refusal(launch(tmp_path, **settings, SCHEDULE="published"))
    assert message.startswith(
        "run/checkpoints continues with the schedule it began with, finetune; got "
        "SCHEDULE=published; leave SCHEDULE out, or"
    )
    assert launch(tmp_path, MODEL="qwen3-nano", RUN_DIR="other").returncode == 0
    (tmp_path / "other" / "checkpoints").mkdir(exist_ok=True)
    (tmp_path / "other" / "checkpoints" / TRACKER).write_text("7")
    found = words(launch(tmp_path, MODEL="qwen3-nano", RUN_DIR="other", DRY_RUN="1", LOAD="gone"))
    assert value(found, "--lr") == "3e-3"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"LOAD": "none"}, "LOAD must be a folder with a checkpoint; got 'none', which does not"),
        ({"LOAD": "hf"}, "LOAD=hf is a Hugging Face model; use ep-plugin convert --from hf --to"),
        (
            {"LOAD": "moe/release"},
            "LOAD=moe/release is one iteration of a checkpoint; use LOAD=moe",
        ),
        ({"LOAD": "empty"}, "LOAD=empty holds no checkpoint"),
        ({"MODEL": "./none"}, "MODEL must be a name or a folder that ep-plugin convert wrote; got"),
        ({"MODEL": "hf"}, "MODEL=hf is a Hugging Face model; use ep-plugin convert --from hf --to"),
        ({"MODEL": "old"}, "MODEL=old has no flags.txt, which ep-plugin convert writes; use LOAD="),
        ({"MODEL": "moe", "SCHEDULE": "published"}, "SCHEDULE=published is for the models of"),
        ({"MODEL": "fresh"}, "SCHEDULE=finetune is for weights that are trained already"),
        ({"SCHEDULE": "finetune"}, "SCHEDULE=finetune is for weights that are trained already"),
    ],
    ids=lambda value: " ".join(value.values()) if isinstance(value, dict) else "",
)
def test_a_folder_that_is_none_is_said_to_be(
    settings: dict[str, str], message: str, tmp_path: Path
) -> None:
    (model(tmp_path / "moe") / "release").mkdir()
    (model(tmp_path / "old") / "flags.txt").unlink()
    (model(tmp_path / "fresh") / TRACKER).unlink()
    for name in ("hf", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "hf" / "config.json").touch()
    done = launch(tmp_path, **{"MODEL": "qwen3-nano", **settings})
    assert refusal(done).startswith(message)
    assert not (tmp_path / "torchrun.calls").exists()
