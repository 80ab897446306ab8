"""Train a small GPT of experts on real text in bf16 and in each FP8 recipe, and compare losses.

python benchmarks/curves.py --data data/quickstart [--iterations 500] [--seeds 7 8]
                            [--output F] [--plot F]

`--data` is a folder that recipes/prepare_data.py wrote. Runs of one seed have the same data,
initial weights and flags; they differ in `--ep-fp8` alone. Two runs that differ in one rounding end
up about half a percent apart, so it takes several seeds to see a difference between recipes. Runs
that an interrupted call wrote to `--output` are kept.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ep_plugin.commands.bench.figures import versions

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
        gpt = {**os.environ, "MODEL_CLASS": "gpt"}  # as in every figure
        subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, env=gpt, check=True)
    text = log.read_text()
    return {
        "parameters": int(PARAMETERS.findall(text)[0]),
        "train_loss": {i: float(loss) for i, loss in LOSS.findall(text)},
        "validation_loss": float(VALIDATION.findall(text)[-1]),
    }


def draw(record: dict[str, Any], path: Path) -> None:
    """Plot the losses of the first seed, and how far each run's are from bf16's of its seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (top, bottom) = pyplot.subplots(2, 1, figsize=(8, 7), sharex=True, layout="constrained")
    bf16 = record["runs"]["bf16"]
    first = next(iter(bf16))
    steps = [int(step) for step in bf16[first]["train_loss"]]
    for index, name in enumerate(name for name in RECIPES if name in record["runs"]):
        runs, color = record["runs"][name], f"C{index}"
        top.plot(steps, list(runs[first]["train_loss"].values()), color, label=name, linewidth=1)
        if name == "bf16":
            continue
        apart = [
            [100 * (x / y - 1) for x, y in zip(*map(_losses, (runs[s], bf16[s])), strict=True)]
            for s in runs
        ]
        for each in apart:
            bottom.plot(steps, each, color, linewidth=0.5, alpha=0.6)
        losses = [runs[s]["validation_loss"] / bf16[s]["validation_loss"] - 1 for s in runs]
        said = ", ".join(f"{100 * loss:+.2f} %" for loss in losses)
        means = [sum(column) / len(column) for column in zip(*apart, strict=True)]
        bottom.plot(steps, means, color, label=f"{name}; validation at the end {said}")
    top.set_ylabel("training loss (nats per token)")
    bottom.set_ylabel("difference from bf16, same seed (%)")
    bottom.axhline(0, color="black", linewidth=0.5)
    bottom.set_xlabel("iteration")
    millions = bf16[first]["parameters"] / 1e6
    top.set_title(f"{millions:.1f}M parameters, {record['device']} (thin: each seed, thick: mean)")
    top.legend()
    bottom.legend()
    figure.savefig(path, dpi=120)


def _losses(run: dict[str, Any]) -> list[float]:
    return list(run["train_loss"].values())


def start(output: Path | None, iterations: int) -> dict[str, Any]:
    """Return the record of this machine, with the runs of as many iterations it has already."""
    record = {
        "bench": "curves",
        "iterations": iterations,
        "runs": {},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "versions": versions(),
        "date": datetime.now(UTC).date().isoformat(),
    }
    if output is not None and output.is_file():
        before = json.loads(output.read_text())
        if all(before[key] == record[key] for key in ("iterations", "device", "versions")):
            record["runs"] = before["runs"]
        else:
            print(f"{output} has other iterations, another device or versions: all runs start anew")
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
