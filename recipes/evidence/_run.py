"""One variant through Megatron's own loop with the plugin, and what it logged as a result."""

import json
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from _model import Size, Variant

from ep_plugin.commands.report.events import read_events

ROOT = Path(__file__).resolve().parents[2]
PARAMETERS = re.compile(r"number of parameters.*: (\d+)")
LAYER = re.compile(r"ep/(max_over_mean|dropped_fraction|router_entropy)/layer_\d+")
TO_SAVE = 45.0  # seconds before the deadline in which runs save their state
PACKAGES = ("torch", "megatron-core", "transformer-engine", "triton")


class Place(NamedTuple):
    """Where runs of one size are, what they read, and how many run at once."""

    runs: Path
    data: Path
    jobs: int


class RunError(Exception):
    """A run ended with another code than 0; its log says why."""


class CutError(Exception):
    """A run was cut at the deadline; where it saved a checkpoint it goes on from there."""


def run(variant: Variant, seed: int, size: Size, place: Place, deadline: float) -> dict[str, Any]:
    """Train it, from its last checkpoint where it was cut, and return its result.

    Raises RunError, and CutError at the deadline.
    """
    folder = place.runs / f"{variant.name}-seed{seed}"
    latest = folder / "checkpoint" / "latest_checkpointed_iteration.txt"
    resumed = (folder / "cut").is_file() and latest.is_file()
    if not resumed:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    steps = variant.iterations(size)
    command = [*size.flags(variant, seed, place.data), *variant.extra(size)]
    command += ["--tensorboard-dir", str(folder / "tensorboard")]
    command += ["--data-cache-path", str(folder / "cache")]
    if variant.ranks:
        return _counted(variant, seed, size, folder, place, command, deadline)
    if not variant.steps:
        command += ["--save", str(folder / "checkpoint"), "--save-interval", str(steps)]
        command += ["--exit-signal-handler"]
    if resumed:
        command += ["--load", str(folder / "checkpoint")]
    elif variant.grown_from:
        command += ["--load", str(_source(variant, seed, folder, size, place, deadline))]
        command += ["--finetune", "--no-load-optim", "--no-load-rng"]
    if variant.teacher:
        command += ["--ep-teacher", str(_checkpoint(variant.teacher, seed, place))]
    script = ["-m", "ep_plugin.run", str(ROOT / "recipes" / "pretrain_gpt.py")]
    (folder / "cut").touch()  # until it has ended
    _call([*script, *command], folder / f"log{'-resumed' * resumed}.txt", size, deadline)
    if not variant.steps and latest.read_text().strip() != str(steps):
        raise CutError(f"cut at --minutes after {latest.read_text().strip()} of {steps} iterations")
    (folder / "cut").unlink()
    result = _result(variant, seed, size, folder, place)
    result["wall_seconds"] = round(time.monotonic() - started, 1)
    if not variant.keep:
        shutil.rmtree(folder / "checkpoint", ignore_errors=True)
    shutil.rmtree(folder / "converted", ignore_errors=True)
    (folder / "result.json").write_text(json.dumps(result) + "\n")
    return result


def _checkpoint(name: str, seed: int, place: Place) -> Path:
    return place.runs / f"{name}-seed{seed}" / "checkpoint"


def _source(
    variant: Variant, seed: int, folder: Path, size: Size, place: Place, deadline: float
) -> Path:
    """Return the checkpoint to start from, converted where the variant says how."""
    source = _checkpoint(variant.grown_from, seed, place)
    if not variant.convert:
        return source
    target = folder / "converted"
    flags = variant.formatted(variant.convert, size)
    if "--keep-layers" not in flags:  # which leaves the optimizer out anyway
        flags.append("--drop-optimizer")
    words = ["convert", "--from", str(source), "--to", str(target), *flags]
    _call(["-m", "ep_plugin.cli", *words], folder / "convert.txt", size, deadline)
    return target


def _call(words: list[str], log: Path, size: Size, deadline: float) -> None:
    """Run Python with these words; raises RunError, and CutError past the deadline.

    It is asked to end before the deadline, so that a training run saves its state and ends with 0.
    """
    threads = "1" if not size.on_gpu else "2"
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONWARNINGS": "ignore"}
    environment["MODEL_CLASS"] = "gpt"  # as in every figure; teachers and tables are of GPTs
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    )
    if not size.on_gpu:
        environment["EP_PLUGIN_DEVICE"] = "cpu"
    left = None if deadline == float("inf") else max(2.0, deadline - time.monotonic())
    saving = min(TO_SAVE, left / 3) if left else 0
    with (
        log.open("w") as out,
        subprocess.Popen(
            [sys.executable, *words], stdout=out, stderr=subprocess.STDOUT, env=environment
        ) as process,
    ):
        try:
            code = process.wait(left and left - saving)
        except subprocess.TimeoutExpired:
            process.terminate()
            try:
                code = process.wait(saving)
            except subprocess.TimeoutExpired:
                process.kill()
                raise CutError("cut at --minutes, and did not end in time") from None
            if code == -signal.SIGTERM:
                raise CutError("cut at --minutes as it started or ended") from None
        except BaseException:
            process.kill()
            raise
    if code:
        last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-3:]
        raise RunError(f"exit code {code}, {log}: {' / '.join(last)[-500:]}")


def _result(variant: Variant, seed: int, size: Size, folder: Path, place: Place) -> dict[str, Any]:
    """Return what is kept of a finished run, from its TensorBoard folder and its log."""
    scalars = read_events(folder / "tensorboard")
    per_step = size.batch * size.sequence
    steps = variant.iterations(size)

    def curve(tag: str) -> list[list[float]]:
        return [[i * per_step, round(v, 5)] for i, v in sorted(scalars.get(tag, {}).items())]

    times = sorted(scalars["iteration-time"].items())
    times = times[len(times) // 8 :][1:] or times  # the first steps compile and allocate
    return {
        **variant.described(size),
        "seed": seed,
        "parameters": int(PARAMETERS.findall((folder / "log.txt").read_text(errors="replace"))[0]),
        "tokens": steps * per_step,
        "heldout": curve("lm loss validation"),
        "train": curve("lm loss"),
        "step_seconds": round(statistics.median(t for _, t in times), 5),
        "beside": place.jobs,
        "experts": _experts(scalars, steps),
        **_made_of(size, place, steps * per_step),
        **made_with(size.on_gpu),
    }


def _made_of(size: Size, place: Place, tokens: int) -> dict[str, Any]:
    corpus = json.loads((place.data / "manifest.json").read_text())
    return {
        "epochs": round(tokens / corpus["train"]["tokens"], 3),
        "corpus": {
            "sha256": corpus["sha256"],
            "distinct_tokens": corpus["train"]["tokens"],
            "heldout_tokens": corpus[size.heldout]["tokens"],
        },
    }


def _counted(
    variant: Variant,
    seed: int,
    size: Size,
    folder: Path,
    place: Place,
    command: list[str],
    deadline: float,
) -> dict[str, Any]:
    """Train on several ranks of the CPU and return what each of them holds."""
    started = time.monotonic()
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(variant.ranks)]
    script = str(ROOT / "recipes" / "evidence" / "_count.py")
    batch = ["--global-batch-size", str(size.batch * variant.ranks)]
    words = [*launch, "-m", "ep_plugin.run", script, str(folder), *command, *batch]
    _call(words, folder / "log.txt", replace(size, on_gpu=False), deadline)
    files = [folder / f"rank{rank}.json" for rank in range(variant.ranks)]
    return {
        **variant.described(size),
        "seed": seed,
        "ranks_hold": [json.loads(file.read_text()) for file in files],
        "heldout": [],
        "beside": place.jobs,
        "experts": {},
        "step_seconds": 0.0,
        **_made_of(size, place, size.batch * variant.ranks * size.sequence),
        **made_with(False),
        "wall_seconds": round(time.monotonic() - started, 1),
    }


def _experts(scalars: dict[str, dict[int, float]], steps: int) -> dict[str, float]:
    """Return the mean over layers and the second half of the run of what routers log."""
    found: dict[str, list[float]] = {}
    for tag, series in scalars.items():
        match = LAYER.fullmatch(tag)
        if match:
            found.setdefault(match[1], []).extend(v for i, v in series.items() if i > steps / 2)
    return {name: round(statistics.mean(values), 5) for name, values in found.items() if values}


def made_with(on_gpu: bool) -> dict[str, Any]:
    """Return hardware, versions and the date."""
    import torch

    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", info.read_text()) if info.is_file() else None
    processor = f"{model[1] if model else platform.processor()}, {os.cpu_count()} cores"
    return {
        "hardware": torch.cuda.get_device_name() if on_gpu else processor,
        "versions": versions,
        "date": datetime.now(UTC).date().isoformat(),
    }
