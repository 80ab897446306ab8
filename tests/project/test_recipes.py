"""Recipes: every model in a layout it fits in, read by Megatron and the plugin; the launcher."""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ep_plugin.commands.plan.memory import stage_memory
from ep_plugin.commands.plan.network import NETWORKS, Traffic, load
from ep_plugin.moe.parallel import ParallelConfig, check_experts_over_ranks
from ep_plugin.presets import load as load_preset

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
RUN = RECIPES / "run.sh"
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
SBATCH = sorted((RECIPES / "slurm").glob("*.sbatch"))
FITS = [  # model, layout, GPUs of 80 GB, RECOMPUTE where it is not the model's own
    ("deepseek-v3", "ep32-pp16", 512, ""),
    ("deepseek-v3", "ep64-pp16", 1024, ""),
    ("deepseek-v3", "tp4-ep64-pp8", 512, ""),
    ("ds-1.3b-moe128", "ep32", 32, ""),
    ("ds-1.3b-prmoe-64-128", "ep32", 32, ""),
    ("ds-350m-moe128", "ep8", 8, ""),
    ("ds-350m-prmoe-32-64", "ep64", 64, ""),
    ("ds-350m-prmoe-32-64", "ep8", 8, ""),
    ("glam-1.7b-64e", "ep8", 16, ""),
    ("glam-64b-64e", "tp4-ep64-pp8", 512, ""),
    ("mixtral-8x22b", "tp2-ep8-pp8", 128, ""),
    ("mixtral-8x7b", "ep8-pp4", 32, ""),
    ("qwen3-235b-a22b", "tp2-ep8-pp8", 128, ""),
    ("qwen3-235b-a22b", "tp4-ep16-pp8", 128, "none"),
    ("qwen3-30b-a3b", "ep8-pp2", 16, ""),
    ("qwen3-30b-a3b", "ep8-pp4", 32, ""),
    ("qwen3-nano", "ep2", 2, ""),
    ("switch-base-128", "tp2-ep4", 4, ""),
    ("switch-base-128", "tp2-ep8", 8, ""),
    ("switch-c-2048", "ep256", 256, ""),
]

# Rows whose model is built as well, without storage: plain, with tensor parallelism, and a pyramid
# whose residual experts have biases.
BUILT = ("mixtral-8x7b-ep8-pp4", "qwen3-235b-a22b-tp2-ep8-pp8", "ds-1.3b-prmoe-64-128-ep32")


def launch(*arguments: str, cwd: Path = ROOT, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run the launcher with `settings` as its environment and nothing else."""
    return subprocess.run(
        [str(RUN), *arguments],
        env={"PATH": PATH, "PYTHONPATH": str(ROOT), **settings},
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )


def dry_run(*arguments: str, **settings: str) -> list[str]:
    """Return the words of the command the launcher would run."""
    done = launch(*arguments, DRY_RUN="1", **settings)
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout.replace("\\\n", ""))


def nodes(gpus: int) -> dict[str, str]:
    return {"NNODES": str(max(gpus // 8, 1)), "MASTER_ADDR": "node0"}


@pytest.fixture(scope="module")
def understood() -> list[dict[str, Any] | str]:
    """What Megatron and the plugin make of each row of FITS, all in one process."""
    rows = []
    for model, layout, gpus, recompute in FITS:
        words = dry_run(
            "pretrain.py", MODEL=model, LAYOUT=layout, RECOMPUTE=recompute, **nodes(gpus)
        )
        vocab = load_preset(model).model.vocab if f"{model}-{layout}" in BUILT else None
        rows.append((gpus, words[words.index("pretrain.py") + 1 :], vocab))
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "helpers" / "read_flags.py")],
        env={**os.environ, "EP_PLUGIN_DEVICE": "cpu", "PYTHONPATH": str(ROOT)},
        input=json.dumps(rows),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[dict[str, Any] | str] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.megatron
@pytest.mark.parametrize("row", range(len(FITS)), ids=["-".join(row[:2]) for row in FITS])
def test_megatron_and_the_plugin_take_the_flags(
    row: int, understood: list[dict[str, Any] | str]
) -> None:
    model, layout, gpus, recompute = FITS[row]
    found = understood[row]
    assert isinstance(found, dict), found
    preset = load_preset(model)
    degrees = {name: found[name] for name in ("tp", "pp", "cp", "ep", "etp")}
    parallel = ParallelConfig(world_size=gpus, **degrees)
    check_experts_over_ranks(max(preset.model.experts), parallel.ep)
    assert found["num_experts"] == max(preset.model.experts)
    assert found["pattern"] == [int(experts > 0) for experts in preset.model.experts]
    assert sum(found["layers"]) == len(preset.model.experts)
    assert len(found["layers"]) == parallel.pp
    assert max(found["layers"]) - min(found["layers"]) <= 2
    batches = [found["global_batch"]]
    if found["rampup"]:
        batches += range(found["rampup"][0], found["global_batch"], found["rampup"][1])
    assert [batch % (found["micro_batch"] * parallel.dp) for batch in batches] == [0] * len(batches)
    assert found["saves_optimizer"]
    assert found["overlap"] == "serial"  # between hosts, and not in a CUDA graph
    assert (found["recompute"] == "full") == (
        not recompute and model in ("deepseek-v3", "qwen3-235b-a22b")
    )
    stages = stage_memory(
        preset,
        parallel,
        found["layers"],
        micro_batch=found["micro_batch"],
        seq_length=found["seq_length"],
        recompute=found["recompute"] == "full",
        dedup=found["dispatch_dedup"],
    )
    assert max(stage.total for stage in stages) < 0.9 * 80e9
    if f"{model}-{layout}" in BUILT:
        held = [[stage.dense_params, stage.expert_params] for stage in (stages[0], stages[-1])]
        assert found["parameters"] == held  # Megatron's own count
    tokens = found["micro_batch"] * found["seq_length"] // parallel.tp
    traffic = Traffic(tokens, found["topk"], found["hidden"], found["num_experts"])
    flat, dedup = (
        load(traffic, NETWORKS["nvlink8"], parallel.ep, how, 2.0) for how in ("flat", "dedup")
    )
    sent, most = dedup.inside + dedup.outside, flat.inside + flat.outside
    assert found["dispatch_dedup"] == (sent < 0.9 * most), (sent, most)


def test_every_recipe_is_in_the_table_and_says_what_it_fits() -> None:
    assert {model for model, *_ in FITS} == {path.stem for path in RECIPES.glob("models/*.sh")}
    assert {row[1] for row in FITS} == {path.stem for path in RECIPES.glob("layouts/*.sh")}
    for model, layout, gpus, _ in FITS:
        text = (RECIPES / "models" / f"{model}.sh").read_text()
        assert layout in text, model
        assert f"{gpus} GPUs" in text, model
        assert re.findall(r"--ep-preset ([\w.-]+)", text) == [model]
    for path in [*RECIPES.glob("models/*.sh"), *RECIPES.glob("layouts/*.sh")]:
        subprocess.run(["bash", "-n", str(path)], check=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"MODEL": "mixtral"}, "MODEL must be one of deepseek-v3 ds-1.3b-moe128 "),
        ({"MODEL": "qwen3-nano", "LAYOUT": ""}, "LAYOUT must be one of ep2 "),
        (
            {"MODEL": "mixtral-8x7b", "LAYOUT": "ep8-pp4", "NNODES": "2"},
            "LAYOUT=ep8-pp4 needs a multiple of 32 GPUs; got NNODES=2 with NPROC_PER_NODE=8; use "
            "NNODES=4",
        ),
        (
            {"MODEL": "mixtral-8x7b", "LAYOUT": "ep8-pp4", "NNODES": "4"},
            "NNODES=4 needs MASTER_ADDR, the host of NODE_RANK=0",
        ),
        ({"MODEL": "mixtrl-8x7b"}, "MODEL must be one of deepseek-v3 "),
        ({"MODEL": "../models/qwen3-nano"}, "MODEL must be a name or a folder that ep-plugin con"),
        ({"LAYOUT": "../layouts/ep2"}, "LAYOUT must be one of ep2 "),
        ({"LAYOUT": "ep2 ep256"}, "LAYOUT must be one of ep2 "),
        ({"NNODES": "two"}, "NNODES must be a whole number from 1 on; got 'two'"),
        ({"NPROC_PER_NODE": "08"}, "NPROC_PER_NODE must be a whole number from 1 on; got '08'"),
        (
            {"NODE_RANK": "1"},
            "NODE_RANK must be below NNODES; got NODE_RANK=1, NNODES=1; use NNODES",
        ),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT must be below 65536; got 99999"),
        ({"RECOMPUTE": "some"}, "RECOMPUTE must be full or none; got 'some'; use RECOMPUTE=full"),
        ({"SCHEDULE": "mine"}, "SCHEDULE must be own, finetune or published; got 'mine'"),
        ({"DRY_RUN": "yes"}, "DRY_RUN must be 0, 1 or check; got 'yes'"),
        ({"LOAD": "none"}, "LOAD must be a folder with a checkpoint; got 'none', which does not"),
        ({"RUN_DIR": "README.md/x"}, "RUN_DIR must be a folder, or one to make; got 'README.md/x'"),
        ({"TOKENIZER_TYPE": "NullTokenizer"}, "TOKENIZER_TYPE=NullTokenizer needs TOKENIZER, "),
        ({}, "PRETRAIN_SCRIPT must be a file; got 'none.py', which is not here"),
    ],
)
def test_mistakes_are_one_sentence_and_code_2(settings: dict[str, str], message: str) -> None:
    done = launch("none.py", **{"MODEL": "qwen3-nano", "LAYOUT": "ep2", **settings})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {message}")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"DATA_PATH": "data/none"}, "DATA_PATH must be the prefix of Megatron's .bin and .idx "),
        ({"TOKENIZER": "./none"}, "TOKENIZER must be a folder, a file, or a name on the Hugging "),
        ({"PATH": "/usr/bin:/bin"}, "torchrun is not on PATH; activate the environment that ep_p"),
    ],
)
def test_files_that_the_run_reads_are_looked_at_before_it(
    settings: dict[str, str], message: str
) -> None:
    """Printing leaves them alone: it may be done on another machine."""
    here = {"MODEL": "qwen3-nano", "LAYOUT": "ep2", **settings}
    done = launch("recipes/pretrain_gpt.py", **{"DRY_RUN": "check", **here})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {message}")
    assert len(done.stderr.splitlines()) == 1
    assert launch("recipes/pretrain_gpt.py", **{"DRY_RUN": "1", **here}).returncode == 0


@pytest.mark.parametrize(
    ("word", "near"),
    [("mixtrl-8x7b", "mixtral"), ("MIXTRAL", "mixtral"), ("30b", "qwen3-30b"), ("qwen", "qwen3-")],
)
def test_the_nearest_models_are_named(word: str, near: str) -> None:
    done = launch("p.py", MODEL=word, LAYOUT="ep2")
    found = re.findall(r"MODEL=(\S+)", done.stderr)
    assert found
    assert all(name.startswith(near) for name in found)


def test_a_layout_of_another_size_is_no_nearest_one() -> None:
    done = launch("p.py", MODEL="qwen3-nano", LAYOUT="ep3")
    assert re.findall(r"use LAYOUT=(\S+)", done.stderr) == ["ep2"]
    assert "LAYOUT=ep32-pp16" not in done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--global-batch-size", "7"], "--global-batch-size must be a multiple of --micro-batch"),
        (["--global-batch-size=16", "--num-layers", "3"], "--num-layers must be a multiple of the"),
    ],
)
def test_what_the_ranks_do_not_divide_is_said_before_the_start(
    flags: list[str], message: str
) -> None:
    where = {"MODEL": "qwen3-nano", "LAYOUT": "ep8-pp2", "NPROC_PER_NODE": "16", "DRY_RUN": "1"}
    done = launch("p.py", *flags, **where)
    assert (done.returncode, done.stderr[: len(message) + 7]) == (2, f"error: {message}")
    use = re.search(r"use (--\S+ \d+)", done.stderr)
    assert use is not None
    fits = ["--global-batch-size", "16", *use[1].split()]
    assert launch("p.py", *fits, **where).returncode == 0


def test_help_lists_what_there_is() -> None:
    done = launch("--help")
    assert (done.returncode, done.stderr) == (0, "")
    for model, layout, *_ in FITS:
        assert model in done.stdout
        assert layout in done.stdout
    assert launch().returncode == 2


def recorder(folder: Path, name: str, body: str = "") -> None:
    """Put a program into `folder` that notes its name and words in `folder`/calls."""
    path = folder / name
    path.write_text(f'#!/usr/bin/env bash\necho "{name} ${{*@Q}}" >>{folder}/calls\n{body}\n')
    path.chmod(0o755)


def test_what_is_printed_is_what_is_run(tmp_path: Path) -> None:
    """Quotes, spaces and stars included; and printing leaves nothing behind."""
    recorder(tmp_path, "torchrun")
    folder = tmp_path / "a user's folder"
    folder.mkdir()
    script = folder / "pre train.py"
    for path in (script, folder / "my *data.idx", folder / "tok $HOME"):
        path.touch()
    settings = {
        "MODEL": "deepseek-v3",
        "LAYOUT": "ep32-pp16",
        "DATA_PATH": f"{folder}/my *data",
        "TOKENIZER": f"{folder}/tok $HOME",
        "RUN_DIR": f"{folder}/run",
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        **nodes(512),
    }
    extra = ("--wandb-exp-name", 'it\'s "mine"', "--data-args-path=x y", "")
    before = sorted(tmp_path.rglob("*"))
    printed = launch(str(script), *extra, DRY_RUN="1", **settings)
    assert sorted(tmp_path.rglob("*")) == before
    assert all(len(line.split(" --")) <= 2 for line in printed.stdout.splitlines())
    assert launch(str(script), *extra, **settings).returncode == 0
    subprocess.run(["bash", "-c", printed.stdout], env=settings, check=True)
    run, pasted = (tmp_path / "calls").read_text().splitlines()
    assert run == pasted
    words = shlex.split(run)
    assert words[words.index("-m") + 1 :][:2] == ["ep_plugin.run", str(script)]
    assert words[words.index("--data-path") + 1] == settings["DATA_PATH"]
    assert words[words.index("--tokenizer-model") + 1] == settings["TOKENIZER"]
    assert words[-4:] == list(extra)


def test_the_third_start_from_one_checkpoint_is_refused(tmp_path: Path) -> None:
    """A newer checkpoint, another one, or an end that was none begins the count anew."""
    recorder(tmp_path, "torchrun", "exit 1")
    (tmp_path / "p.py").touch()
    saved = tmp_path / "run" / "checkpoints"
    settings = {
        **{"MODEL": "qwen3-nano", "LAYOUT": "ep2", "RUN_DIR": f"{tmp_path}/run"},
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }

    def starts(*flags: str, **more: str) -> tuple[bool, str]:
        calls = tmp_path / "calls"
        calls.unlink(missing_ok=True)
        done = launch(f"{tmp_path}/p.py", *flags, **settings, **more)
        assert done.returncode == (1 if more.get("DRY_RUN") is None else done.returncode)
        return calls.exists(), done.stderr

    for where in ("the beginning", "iteration 400", "iteration 800"):
        assert starts() == (True, "")
        assert starts(DRY_RUN="1") == (False, "")
        assert starts() == (True, "")
        for more in ({}, {"DRY_RUN": "check"}):
            started, said = starts(**more)
            assert not started
            assert said.startswith(f"error: the last two starts from {where} ended without a newer")
            assert f"remove {saved}/starts.txt, or start from another checkpoint with" in said
            assert len(said.splitlines()) == 1
        assert starts("--lr=1") == starts("--lr=1") == (True, "")  # another command
        assert not starts("--lr=1", MASTER_PORT="7000")[0]  # at another port the same
        assert starts() == starts() == (True, "")
        if where != "the beginning":
            assert starts("--ckpt-step=200") == starts("--ckpt-step=200") == (True, "")
            assert not starts("--ckpt-step=200")[0]
        step = {"the beginning": "400", "iteration 400": "800"}.get(where, "800")
        (saved / "latest_checkpointed_iteration.txt").write_text(step)
    (saved / "starts.txt").unlink()  # as the plugin does where a run ends well
    assert starts() == starts() == (True, "")
    assert starts(SLURM_RESTART_COUNT="1") == starts() == (True, "")  # Slurm ended that turn
    (saved / "not_saved.json").touch()
    assert not starts(SLURM_RESTART_COUNT="2")[0]
    own = tmp_path / "own"
    own.mkdir()
    flags = ("--save", str(own), "--load", str(own))
    for step in ("1", "2", "3"):
        (own / "latest_checkpointed_iteration.txt").write_text(step)
        assert starts(*flags) == (True, "")


@pytest.mark.parametrize(
    ("script", "forgotten"),
    [
        ("", True),  # as with --skip-train
        ("raise SystemExit(0)", True),
        ("raise SystemExit", True),
        ("raise SystemExit(3)", False),  # nan in the last save, which comes after training
        ("raise OSError('No space left on device')", False),
    ],
)
def test_only_a_script_that_ends_well_is_no_failed_start(
    script: str, forgotten: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is the one that the recipe names, whatever --save says."""
    from ep_plugin import run
    from ep_plugin.megatron.seams import install

    monkeypatch.setattr(install, "install", lambda: None)
    monkeypatch.setattr(install, "say_unused", lambda: None)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "p.py").write_text(script)
    recorder(tmp_path, "torchrun", 'echo "$EP_PLUGIN_STARTS" >"${0%/*}/named"; exit 1')
    launch(
        f"{tmp_path}/p.py",
        *("--save", f"{tmp_path}/own"),
        **{"MODEL": "qwen3-nano", "LAYOUT": "ep2", "RUN_DIR": f"{tmp_path}/run"},
        PATH=f"{tmp_path}:{os.environ['PATH']}",
    )
    named = Path((tmp_path / "named").read_text().strip())
    assert named.exists()
    monkeypatch.setenv("EP_PLUGIN_STARTS", str(named))
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        assert named.exists()
        with contextlib.suppress(SystemExit, OSError):
            run.run_script(f"{tmp_path}/p.py", [])
    assert named.exists() is not forgotten


def value(words: list[str], flag: str) -> str | None:
    return words[words.index(flag) + 1] if flag in words else None


def test_a_run_continues_from_its_own_checkpoint(tmp_path: Path) -> None:
    recipe = {"MODEL": "qwen3-nano", "LAYOUT": "ep2"}
    words = dry_run("p.py", **recipe)
    assert value(words, "--save") == "runs/qwen3-nano-ep2/checkpoints"
    assert "--load" not in words
    converted = tmp_path / "converted"
    converted.mkdir()
    (converted / "latest_checkpointed_iteration.txt").write_text("release")
    settings = {**recipe, "RUN_DIR": str(tmp_path), "LOAD": str(converted)}
    words = dry_run("p.py", **settings)
    assert value(words, "--load") == str(converted)
    assert value(words, "--lr") == "1e-5"  # not that of pretraining
    assert value(dry_run("p.py", **settings, SCHEDULE="published"), "--lr") == "3e-3"
    assert "--finetune" in words
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("7")
    words = dry_run("p.py", **settings)
    assert value(words, "--load") == value(words, "--save") == f"{tmp_path}/checkpoints"
    assert "--finetune" not in words


def test_the_schedule_and_the_data_can_be_the_user_s() -> None:
    recipe = {"MODEL": "deepseek-v3", "LAYOUT": "ep32-pp16", **nodes(512)}
    words = dry_run("p.py", "--data-path", "1", "a", "2", "b", **recipe, SCHEDULE="own")
    for flag in ("--lr", "--rampup-batch-size", "--train-samples", "--mock-data"):
        assert flag not in words
    words = dry_run("p.py", "--tokenizer-type=GPT2BPETokenizer", **recipe, WANDB_PROJECT="moe")
    assert "NullTokenizer" not in words
    assert "--mock-data" in words
    assert value(words, "--wandb-exp-name") == "deepseek-v3-ep32-pp16"


@pytest.mark.parametrize("path", SBATCH, ids=lambda path: path.name)
def test_slurm_prints_without_slurm(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)
    text = path.read_text()
    for needed in ("--requeue", "--signal=B:USR1@", "--ntasks-per-node=1", "set -euo pipefail"):
        assert needed in text
    settings = {"MODEL": "qwen3-30b-a3b", "LAYOUT": "ep8-pp4", "NNODES": "4", "DRY_RUN": "1"}
    done = subprocess.run(
        ["bash", str(path), "pre train.py"],
        env={"PATH": os.environ["PATH"], **settings},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    words = shlex.split(done.stdout.replace("\\\n", ""), comments=True)
    assert words[: words.index("env")][-2:] == [str(RUN), "pre train.py"]
    assert words[:3] == ["srun", "--nodes", "4"]
    assert value(words, "--nnodes") == "4"


def test_a_job_about_to_end_saves_and_goes_back_into_the_queue(tmp_path: Path) -> None:
    """The real script with programs that stand for Slurm's: the step saves on SIGTERM."""
    recorder(tmp_path, "scontrol", '[[ "$1" == show ]] && printf "host-a\\nhost-b\\n"; true')
    recorder(tmp_path, "scancel", f'kill -TERM "$(cat {tmp_path}/step)"')
    saves = f"trap 'echo saved $MASTER_ADDR $NNODES >>{tmp_path}/calls; exit 1' TERM"
    waits = f"echo $$ >{tmp_path}/step; for i in {{1..3000}}; do sleep 0.02; done"
    recorder(tmp_path, "srun", f"{saves}\n{waits}")
    recorder(tmp_path, "torchrun")
    slurm = {"SLURM_JOB_ID": "77", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "host-[a-b]"}
    job = subprocess.Popen(
        ["bash", str(SBATCH[0]), "recipes/pretrain_gpt.py"],
        env={
            **{"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(ROOT)},
            **{"MODEL": "qwen3-nano", "LAYOUT": "ep2", "NPROC_PER_NODE": "2", **slurm},
        },
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for(lambda: (tmp_path / "step").exists() and (tmp_path / "step").read_text().strip())
        job.send_signal(signal.SIGUSR1)
        output, _ = job.communicate(timeout=60)
    finally:
        job.kill()
    assert job.returncode == 0
    assert output.startswith("requeue: job 77 is about to end")
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[0] == "scontrol 'show' 'hostnames' 'host-[a-b]'"
    assert calls[1].endswith(f"'{RUN}' 'recipes/pretrain_gpt.py'")
    assert calls[2:] == [
        "scancel '--signal=TERM' '77'",
        "saved host-a 2",
        "scontrol 'requeue' '77'",
    ]


def wait_for(condition: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


TRIAL = ("--log-interval=1", "--num-workers=0", "--train-iters=2000")
ADAM = ("param", "exp_avg", "exp_avg_sq")


@pytest.mark.megatron
def test_a_run_that_is_asked_to_end_leaves_a_checkpoint_with_its_optimizer(tmp_path: Path) -> None:
    """Megatron's loop on two CPU ranks through the launcher, ended by SIGTERM as Slurm would."""
    settings = {"MODEL": "qwen3-nano", "LAYOUT": "ep2", "RUN_DIR": str(tmp_path / "a run")}
    log = tmp_path / "log"
    with log.open("w") as stream:
        job = subprocess.Popen(
            [str(RUN), "recipes/pretrain_gpt.py", *TRIAL],
            env={
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                "PYTHONPATH": str(ROOT),
                "EP_PLUGIN_DEVICE": "cpu",
                "OMP_NUM_THREADS": "1",
                "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "240",
                **settings,
            },
            cwd=ROOT,
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_for(lambda: " iteration        2/" in log.read_text() or job.poll() is not None, 300)
        job.terminate()
        job.wait(300)
    finally:
        job.kill()
    saved = tmp_path / "a run" / "checkpoints"
    tracker = saved / "latest_checkpointed_iteration.txt"
    assert tracker.exists(), log.read_text()[-4000:]
    reached = int(tracker.read_text())
    assert 2 <= reached < 2000
    assert not (saved / "starts.txt").exists()  # it did not fail
    from torch.distributed.checkpoint import FileSystemReader

    keys = FileSystemReader(saved / f"iter_{reached:07d}").read_metadata().state_dict_metadata
    for layer in range(4):
        weight = f"decoder.layers.{layer}.mlp.experts.experts.linear_fc1.weight"
        for key in (weight, *(f"optimizer.state.{state}.{weight}" for state in ADAM)):
            assert tuple(keys[key].size) == (8, 128, 64)  # of all experts, both ranks'
    words = dry_run("p.py", **settings)
    assert value(words, "--load") == str(saved)
