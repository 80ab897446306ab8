"""Train a small GPT of experts on real text in bf16 and in each FP8 recipe, and compare losses.

python benchmarks/curves.py --data data/quickstart [--iterations 500] [--output F] [--plot F]

`--data` is a folder that recipes/prepare_data.py wrote. All runs have the same seed, data and
flags; they differ in `--ep-fp8` alone. Runs that an interrupted call wrote to `--output` are kept.
"""

import argparse
import json
import platform
import re
import shlex
import subprocess
import sys
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
    "rowwise, wgrad bf16": "--ep-fp8 rowwise --ep-fp8-wgrad bf16",
}
FLAGS = """
--num-layers 4 --hidden-size 384 --ffn-hidden-size 1024 --num-attention-heads 6
--seq-length 512 --max-position-embeddings 512 --position-embedding-type rope --swiglu
--disable-bias-linear --untie-embeddings-and-output-weights --normalization RMSNorm
--num-experts 8 --moe-router-topk 2 --moe-ffn-hidden-size 384 --moe-aux-loss-coeff 1e-2
--moe-token-dispatcher-type alltoall --attention-dropout 0 --hidden-dropout 0
--micro-batch-size 16 --global-batch-size 16 --lr 1e-3 --min-lr 1e-4 --lr-decay-style cosine
--lr-warmup-iters 20 --weight-decay 0.1 --clip-grad 1.0 --seed 7 --num-workers 0 --bf16
--transformer-impl local --no-masked-softmax-fusion --no-gradient-accumulation-fusion
--no-persist-layer-norm --no-rope-fusion --log-interval 10 --eval-interval 100000
--eval-iters 20 --split 95,5,0 --tokenizer-type NullTokenizer --ep-deterministic on
"""
LOSS = re.compile(r"iteration +(\d+)/.*lm loss: (\S+)")
VALIDATION = re.compile(r"on validation set \| lm loss value: (\S+)")
PARAMETERS = re.compile(r"number of parameters.*: (\d+)")


def train(extra: str, data: Path, iterations: int, log: Path) -> dict[str, Any]:
    """Return the training losses, mean over 10 iterations each, and the last validation loss."""
    vocabulary = json.loads((data / "manifest.json").read_text())["vocab_size"]
    flags = [
        *shlex.split(FLAGS + extra),
        *("--train-iters", str(iterations), "--vocab-size", str(vocabulary)),
        *("--data-path", str(data / "corpus"), "--data-cache-path", str(log.parent / "cache")),
    ]
    command = [sys.executable, "-m", "ep_plugin.run", str(ROOT / "recipes/pretrain_gpt.py"), *flags]
    with log.open("w") as out:
        subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, check=True)
    text = log.read_text()
    return {
        "parameters": int(PARAMETERS.findall(text)[0]),
        "train_loss": {int(i): float(loss) for i, loss in LOSS.findall(text)},
        "validation_loss": float(VALIDATION.findall(text)[-1]),
    }


def draw(record: dict[str, Any], path: Path) -> None:
    """Plot the losses, and how far each recipe's is from bf16's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (top, bottom) = pyplot.subplots(2, 1, figsize=(8, 7), sharex=True, layout="constrained")
    base = record["runs"]["bf16"]["train_loss"]
    for index, (name, run) in enumerate(record["runs"].items()):
        steps = [int(step) for step in run["train_loss"]]
        losses = list(run["train_loss"].values())
        label = f"{name}: validation {run['validation_loss']:.4f}"
        top.plot(steps, losses, f"C{index}", label=label, linewidth=1)
        if name != "bf16":
            apart = [100 * (x / y - 1) for x, y in zip(losses, base.values(), strict=True)]
            bottom.plot(steps, apart, f"C{index}", label=name, linewidth=1)
    top.set_ylabel("training loss (nats per token)")
    bottom.set_ylabel("difference from bf16 (%)")
    bottom.axhline(0, color="black", linewidth=0.5)
    bottom.set_xlabel("iteration")
    top.set_title(
        f"{record['runs']['bf16']['parameters'] / 1e6:.1f}M parameters, {record['device']}"
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
    parser.add_argument("--logs", type=Path, default=Path("runs/curves"))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    args.logs.mkdir(parents=True, exist_ok=True)
    record = start(args.output, args.iterations)
    runs = record["runs"]
    for name, extra in tqdm(RECIPES.items(), disable=None):
        if name in runs:
            continue
        log = args.logs / f"{name.replace(', ', '_').replace(' ', '_')}.log"
        runs[name] = train(extra, args.data, args.iterations, log)
        print(f"{name:22} validation loss {runs[name]['validation_loss']:.4f}", flush=True)
        if args.output is not None:
            args.output.write_text(json.dumps(record, indent=1) + "\n")
    if args.plot is not None:
        draw(record, args.plot)


if __name__ == "__main__":
    main()
