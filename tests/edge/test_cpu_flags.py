"""CPU mode takes away and names each flag that needs a GPU, or refuses it before a model is built.

Every shipped preset and recipe takes a step in it.
"""

import json
import os
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from loop import OURS, ROOT, SCRIPT
from releases import shared_out_here
from warm import run_script

from ep_plugin.commands.parity.comparable import expand_preset, without
from ep_plugin.commands.parity.layouts import LAYOUT_FLAGS, ONE_RANK
from ep_plugin.commands.parity.tiny import shrink
from ep_plugin.megatron.cpu import mode as cpu_mode
from ep_plugin.megatron.cpu.arguments import GIVEN, REFUSED, flag
from ep_plugin.presets import presets

pytestmark = [
    pytest.mark.megatron,
    pytest.mark.skipif(
        not cpu_mode.wanted(), reason="a GPU is here and EP_PLUGIN_DEVICE is not cpu"
    ),
]
CPU = {**os.environ, "OMP_NUM_THREADS": "1", "EP_PLUGIN_DEVICE": "cpu"}
# What speaks of GPUs and has no row: why -> arguments, or how their names begin
NO_ROW = {
    "text generation and reinforcement learning": (
        "rl_", "refit_", "inference_", "decode_only", "symmetric_memory",
    ),
    "belongs to FSDP, which is refused": (
        "fsdp_", "megatron_fsdp_", "torch_fsdp2_", "strict_fsdp_", "outer_dp_",
        "enable_full_sharding", "suggested_communication", "data_parallel_sharding",
    ),
    "belongs to a flag that is taken away": (
        "flight_recorder_", "record_shapes", "kitchen_", "profile", "nccl_ub",
    ),
    "does the same on the CPU, or nothing there either": (
        "empty_unused", "train_sync", "seed", "ckpt_format", "distrib_optim_fully_reshardable_mem",
        "ddp_pad_buckets", "gradient_reduce_div", "fake_process_group", "eval_micro_batch",
        "log_throughput", "inprocess_",
    ),
}  # fmt: skip


@cache
def walked() -> dict[str, Any]:
    """Return what `walk_cpu_flags.py` says of the Megatron that is here."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests/helpers"), CPU.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "helpers" / "walk_cpu_flags.py")],
        env={**CPU, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_each_flag_for_a_gpu_is_taken_away_and_named_or_refused_in_one_sentence() -> None:
    values = [value for _, value in GIVEN.values()]
    refused = [flag(name) for name in REFUSED]
    alone = walked()["alone"]
    assert len(alone) > 50
    for flags, found in alone.items():
        *_, last = [word for word in flags.split() if word.startswith("--")]
        if last in refused:
            assert found["error"].startswith(f"ep_plugin: error: {last}"), (flags, found)
            assert "; use " in found["error"] or "; leave it out" in found["error"]
            continue
        assert not found["error"], (flags, found)
        if flags not in values and not last.startswith("--no-"):
            given = [value for value in values if value.startswith(f"{last} ")]
            assert (given[0] if given else last) in found["line"], (flags, found)


def test_every_other_flag_that_speaks_of_gpus_has_a_reason() -> None:
    known = tuple(name for names in NO_ROW.values() for name in names)
    assert [name for name in walked()["sounds"] if not name.startswith(known)] == []


RECIPES = sorted(path.stem for path in (ROOT / "recipes" / "models").glob("*.sh"))
LAYOUTS = sorted(path.stem for path in (ROOT / "recipes" / "layouts").glob("*.sh"))
# Presets that recipes name run with them; small ones train in `test_presets_train.py`.
REST = [name for name in presets() if name not in RECIPES and not name.endswith("-nano")]
SCHEDULE = (
    *("--train-samples", "--train-iters", "--rampup-batch-size", "--lr-decay-samples"),
    *("--lr-warmup-samples", "--lr-warmup-iters", "--lr-decay-style", "--lr-wsd-decay-style"),
    *("--lr-wsd-decay-samples", "--save", "--save-interval", "--eval-interval", "--eval-iters"),
    *("--tensorboard-dir", "--data-cache-path"),
)
ONE_STEP = shlex.split(
    "--train-iters 1 --lr-decay-style constant --eval-iters 0 --eval-interval 10 --num-workers 0"
)


def step(flags: list[str]) -> str:
    """Run the loop for one step of a small model of these flags; return what it printed."""
    kept, _ = without(expand_preset(flags), (*SCHEDULE, *LAYOUT_FLAGS))
    return run(*shrink([*kept, *ONE_STEP], [ONE_RANK]).all)


@cache  # sizes of one system become the same small model
def run(*flags: str) -> str:
    done = run_script(1, [*OURS, SCRIPT, *flags], CPU)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("name", REST)
def test_every_preset_takes_a_step(name: str) -> None:
    if not shared_out_here(name):
        pytest.skip("another older release takes it")
    assert " iteration        1/" in step(["--ep-preset", name])


def recipe(model: str, layout: str, folder: Path) -> list[str]:
    """Return the flags that the launcher gives a script."""
    settings = {"MODEL": model, "LAYOUT": layout, "NNODES": "128", "MASTER_ADDR": "node0"}
    done = subprocess.run(
        [str(ROOT / "recipes" / "run.sh"), "pretrain.py", "--global-batch-size", "65536"],
        env={"PATH": os.environ["PATH"], "DRY_RUN": "1", "RUN_DIR": str(folder), **settings},
        capture_output=True,
        text=True,
        check=True,
    )
    words = shlex.split(done.stdout.replace("\\\n", ""))
    return words[words.index("pretrain.py") + 1 :]


@pytest.mark.parametrize("number", range(max(len(RECIPES), len(LAYOUTS))))
def test_every_recipe_takes_a_step(number: int, tmp_path: Path) -> None:
    """Each file of models/ and of layouts/ at least once, with all that the launcher adds."""
    model, layout = RECIPES[number % len(RECIPES)], LAYOUTS[number % len(LAYOUTS)]
    if not shared_out_here(f"{model} {layout}"):
        pytest.skip("another older release takes it")
    assert " iteration        1/" in step(recipe(model, layout, tmp_path))


def test_a_whole_command_line_for_gpus_takes_a_step_and_says_what_is_left_out() -> None:
    """What Megatron's own examples of experts have, at once."""
    fast = shlex.split(
        "--moe-permute-fusion --moe-grouped-gemm --moe-router-fusion --overlap-grad-reduce "
        "--recompute-granularity selective --recompute-modules layernorm core_attn "
        "--attention-backend flash --use-precision-aware-optimizer --use-distributed-optimizer "
        "--exp-avg-dtype bf16 --tp-comm-overlap --bf16 --fp8-format hybrid --use-nccl-ub "
        "--log-memory-to-tensorboard --ddp-average-in-collective"
    )
    said = step(["--ep-preset", "mixtral-8x7b", *fast])
    [line] = [line for line in said.splitlines() if "CPU mode (gloo, no" in line]
    for word in ("--moe-permute-fusion", "--recompute-modules layernorm", "--fp8-format"):
        assert word in line.partition("without ")[2]
    assert " iteration        1/" in said
