"""One variant through Megatron's own loop with the plugin, and what it logged as a result."""

import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from _model import Size, Variant

from ep_plugin.commands.report.events import read_events

ROOT = Path(__file__).resolve().parents[2]
PARAMETERS = re.compile(r"number of parameters.*: (\d+)")
LAYER = re.compile(r"ep/(max_over_mean|dropped_fraction|router_entropy)/layer_\d+")
PACKAGES = ("torch", "megatron-core", "transformer-engine", "triton")


class Place(NamedTuple):
    """Where runs of one size are, what they read, and how many run at once."""

    runs: Path
    data: Path
    jobs: int


class RunError(Exception):
    """A run ended with another code than 0; its log says why."""


def run(variant: Variant, seed: int, size: Size, place: Place, deadline: float) -> dict[str, Any]:
    """Train it and return its result; raises RunError, and TimeoutExpired at the deadline."""
    folder = place.runs / f"{variant.name}-seed{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    started = time.monotonic()
    command = [*size.flags(variant.share, seed, place.data), *variant.extra(size)]
    command += ["--tensorboard-dir", str(folder / "tensorboard")]
    command += ["--data-cache-path", str(folder / "cache")]
    if variant.keep:
        command += ["--save", str(folder / "checkpoint"), "--no-save-optim"]
        command += ["--save-interval", str(size.iterations(variant.share))]
    if variant.grown_from:
        source = place.runs / f"{variant.grown_from}-seed{seed}" / "checkpoint"
        if variant.convert:
            source = _converted(source, variant, folder, size, deadline)
        command += ["--load", str(source), "--finetune", "--no-load-optim", "--no-load-rng"]
    script = ["-m", "ep_plugin.run", str(ROOT / "recipes" / "pretrain_gpt.py")]
    _call([*script, *command], folder / "log.txt", size, deadline)
    result = _result(variant, seed, size, folder, place)
    result["wall_seconds"] = round(time.monotonic() - started, 1)
    if not variant.keep:
        shutil.rmtree(folder / "converted", ignore_errors=True)
    (folder / "result.json").write_text(json.dumps(result) + "\n")
    return result


def _converted(source: Path, variant: Variant, folder: Path, size: Size, deadline: float) -> Path:
    target = folder / "converted"
    words = [
        "--from",
        str(source),
        "--to",
        str(target),
        "--drop-optimizer",
        *variant.convert.split(),
    ]
    _call(["-m", "ep_plugin.cli", "convert", *words], folder / "convert.txt", size, deadline)
    return target


def _call(words: list[str], log: Path, size: Size, deadline: float) -> None:
    threads = "1" if not size.on_gpu else "2"
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONWARNINGS": "ignore"}
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    )
    if not size.on_gpu:
        environment["EP_PLUGIN_DEVICE"] = "cpu"
    left = None if deadline == float("inf") else max(1.0, deadline - time.monotonic())
    with log.open("w") as out:
        done = subprocess.run(
            [sys.executable, *words],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment,
            timeout=left,
            check=False,
        )
    if done.returncode:
        last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-3:]
        raise RunError(f"exit code {done.returncode}, {log}: {' / '.join(last)[-500:]}")


def _result(variant: Variant, seed: int, size: Size, folder: Path, place: Place) -> dict[str, Any]:
    """Return what is kept of a finished run, from its TensorBoard folder and its log."""
    scalars = read_events(folder / "tensorboard")
    per_step = size.batch * size.sequence
    steps = size.iterations(variant.share)
    corpus = json.loads((place.data / "manifest.json").read_text())

    def curve(tag: str) -> list[list[float]]:
        return [[i * per_step, round(v, 5)] for i, v in sorted(scalars[tag].items())]

    times = sorted(scalars["iteration-time"].items())[1:] or sorted(
        scalars["iteration-time"].items()
    )
    return {
        **variant.described(size),
        "seed": seed,
        "parameters": int(PARAMETERS.findall((folder / "log.txt").read_text())[0]),
        "tokens": steps * per_step,
        "epochs": round(steps * per_step / corpus["train"]["tokens"], 3),
        "heldout": curve("lm loss validation"),
        "train": curve("lm loss"),
        "step_seconds": round(statistics.median(t for _, t in times), 5),
        "beside": place.jobs,
        "experts": _experts(scalars, steps),
        "corpus": {
            "sha256": corpus["sha256"],
            "distinct_tokens": corpus["train"]["tokens"],
            "heldout_tokens": corpus[size.heldout]["tokens"],
        },
        **made_with(size.on_gpu),
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
