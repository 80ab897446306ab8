"""Train a small GPT of experts on real text in bf16 and in each FP8 recipe, and compare losses.

python benchmarks/curves.py --data data/quickstart [--iterations 500] [--seeds 7 8]
                            [--output F] [--plot F]

`--data` is a folder that recipes/prepare_data.py wrote. Runs of one seed have the same data,
initial weights and flags; they differ in `--ep-fp8` alone. Two runs that differ in one rounding end
up about half a percent apart, so recipes are compared by means over seeds. Runs that an interrupted
call wrote to `--output` are kept.
"""

import argparse
import json
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
RECIPES = {
    "bf16": "",
    "rowwise": "--ep-fp8 rowwise",
    "blockwise": "--ep-fp8 blockwise",
}
FLAGS = """
--num-layers 4 --hidden-size 384 --ffn-hidden-size 1024 --num-attention-heads 6
--seq-length 512 --max-position-embeddings 512 --position-embedding-type rope --swiglu
--disable-bias-linear --untie-embeddings-and-output-weights --normalization RMSNorm
--num-experts 8 --moe-router-topk 2 --moe-ffn-hidden-size 384 --moe-aux-loss-coeff 1e-2
--moe-token-dispatcher-type alltoall --attention-dropout 0 --hidden-dropout 0
--micro-batch-size 16 --global-batch-size 16 --lr 1e-3 --min-lr 1e-4 --lr-decay-style cosine
--lr-warmup-iters 20 --weight-decay 0.1 --clip-grad 1.0 --num-workers 0 --bf16
--transformer-impl local --no-masked-softmax-fusion --no-gradient-accumulation-fusion
--no-persist-layer-norm --no-rope-fusion --log-interval 10 --eval-interval 100000
--eval-iters 20 --split 95,5,0 --tokenizer-type NullTokenizer --ep-deterministic on
"""
LOSS = re.compile(r"iteration +(\d+)/.*lm loss: (\S+)")
VALIDATION = re.compile(r"on validation set \| lm loss value: (\S+)")
PARAMETERS = re.compile(r"number of parameters.*: (\d+)")


def train(extra: str, seed: int, data: Path, iterations: int, log: Path) -> dict[str, Any]:
    """Return the training losses, mean over 10 iterations each, and the last validation loss."""
    vocabulary = json.loads((data / "manifest.json").read_text())["vocab_size"]
    flags = [
        *shlex.split(FLAGS + extra),
        *("--seed", str(seed), "--train-iters", str(iterations), "--vocab-size", str(vocabulary)),
        *("--data-path", str(data / "corpus"), "--data-cache-path", str(log.parent / "cache")),
    ]
    command = [sys.executable, "-m", "ep_plugin.run", str(ROOT / "recipes/pretrain_gpt.py"), *flags]
    with log.open("w") as out:
        subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, check=True)
    text = log.read_text()
    return {
        "parameters": int(PARAMETERS.findall(text)[0]),
        "train_loss": {i: float(loss) for i, loss in LOSS.findall(text)},
        "validation_loss": float(VALIDATION.findall(text)[-1]),
    }


def mean(runs: dict[str, Any], value: Callable[[Any], float]) -> float:
    """Return the mean over seeds."""
    return sum(map(value, runs.values())) / len(runs)


def losses(runs: dict[str, Any]) -> dict[int, float]:
    """Return iteration -> training loss, mean over seeds."""
    steps = next(iter(runs.values()))["train_loss"]
    return {int(step): mean(runs, lambda run, s=step: run["train_loss"][s]) for step in steps}


def draw(record: dict[str, Any], path: Path) -> None:
    """Plot the losses, means over seeds, and how far each recipe's is from bf16's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (top, bottom) = pyplot.subplots(2, 1, figsize=(8, 7), sharex=True, layout="constrained")
    recipes = [name for name in RECIPES if name in record["runs"]]
    base = losses(record["runs"]["bf16"])
    for index, name in enumerate(recipes):
        runs = record["runs"][name]
        curve = losses(runs)
        label = f"{name}: validation {mean(runs, lambda run: run['validation_loss']):.4f}"
        top.plot(list(curve), list(curve.values()), f"C{index}", label=label, linewidth=1)
        for each in runs.values() if len(runs) > 1 else ():
            apart = [100 * (loss / base[int(s)] - 1) for s, loss in each["train_loss"].items()]
            bottom.plot(list(curve), apart, f"C{index}", linewidth=0.5, alpha=0.5)
        apart = [100 * (loss / base[step] - 1) for step, loss in curve.items()]
        bottom.plot(list(curve), apart, f"C{index}", label=name, linewidth=1.5)
    top.set_ylabel("training loss (nats per token)")
    bottom.set_ylabel("difference from bf16's mean (%)")
    bottom.set_xlabel("iteration")
    seeds = record["runs"]["bf16"]
    parameters = next(iter(seeds.values()))["parameters"]
    top.set_title(
        f"{parameters / 1e6:.1f}M parameters, {record['device']}, mean of {len(seeds)} seeds "
        "(thin: each seed)"
    )
    top.legend()
    bottom.legend()
    figure.savefig(path, dpi=120)


def start(output: Path | None, iterations: int) -> dict[str, Any]:
    """Return the record of this machine, with the runs of as many iterations it has already."""
    record = {
        "bench": "curves",
        "iterations": iterations,
        "runs": {},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "megatron-core": version("megatron-core"),
        },
        "date": datetime.now(UTC).date().isoformat(),
    }
    if output is not None and output.is_file():
        before = json.loads(output.read_text())
        if all(before[key] == record[key] for key in ("iterations", "device", "versions")):
            record["runs"] = before["runs"]
    return record


def main() -> None:
    """Train, print, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--iterations", type=int, default=500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[7, 8])
    parser.add_argument("--logs", type=Path, default=Path("runs/curves"))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    args.logs.mkdir(parents=True, exist_ok=True)
    record = start(args.output, args.iterations)
    runs = record["runs"]
    todo = [(seed, name) for seed in args.seeds for name in RECIPES]
    for seed, name in tqdm(todo, disable=None):
        seen = runs.setdefault(name, {})
        if str(seed) in seen:
            continue
        log = args.logs / f"{name.replace(', ', '_').replace(' ', '_')}_{seed}.log"
        seen[str(seed)] = train(RECIPES[name], seed, args.data, args.iterations, log)
        loss = seen[str(seed)]["validation_loss"]
        print(f"{name:22} seed {seed}: validation loss {loss:.4f}", flush=True)
        if args.output is not None:
            args.output.write_text(json.dumps(record, indent=1) + "\n")
    if args.plot is not None:
        draw(record, args.plot)


if __name__ == "__main__":
    main()
