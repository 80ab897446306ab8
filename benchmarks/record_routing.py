"""Record how many tokens each expert gets in a real run, for `ep-plugin bench --routing recorded`.

    python benchmarks/record_routing.py --data data/quickstart

trains a small GPT on the CPU, with real text that recipes/prepare_data.py wrote, and writes the
counts of its last iteration, layer by layer, with what made them, to
ep_plugin/commands/bench/recorded_routing.json. It takes a few minutes on one core.
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ep_plugin.commands.bench.figures import versions
from ep_plugin.commands.report.events import read_events

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "ep_plugin" / "commands" / "bench" / "recorded_routing.json"
EXPERTS, TOPK, SEQUENCE, BATCH = 64, 8, 256, 16
MODEL = f"""
--num-layers 4 --hidden-size 128 --num-attention-heads 4 --seq-length {SEQUENCE}
--ffn-hidden-size 384 --max-position-embeddings {SEQUENCE} --position-embedding-type rope --swiglu
--disable-bias-linear --untie-embeddings-and-output-weights --normalization RMSNorm
--attention-dropout 0 --hidden-dropout 0 --num-experts {EXPERTS} --moe-router-topk {TOPK}
--moe-ffn-hidden-size 64 --moe-aux-loss-coeff 1e-3 --moe-router-dtype fp32
--micro-batch-size {BATCH} --global-batch-size {BATCH} --lr 2e-3 --min-lr 2e-4
--lr-decay-style cosine --lr-warmup-fraction 0.1 --clip-grad 1.0 --weight-decay 0.1 --seed 7
--num-workers 0 --log-interval 1 --eval-iters 0 --eval-interval 100000 --split 100,0,0
--tokenizer-type NullTokenizer --transformer-impl local --no-masked-softmax-fusion
--no-persist-layer-norm --no-rope-fusion --no-gradient-accumulation-fusion
"""


def train(data: Path, corpus: str, iterations: int, folder: Path) -> list[list[float]]:
    """Return each expert's share of the tokens of the last iteration, layer by layer."""
    vocabulary = json.loads((data / "manifest.json").read_text())["vocab_size"]
    command = [
        *(sys.executable, "-m", "ep_plugin.run", str(ROOT / "recipes" / "pretrain_gpt.py")),
        *(*shlex.split(MODEL), "--train-iters", str(iterations)),
        *("--data-path", str(data / corpus), "--vocab-size", str(vocabulary)),
        *("--data-cache-path", str(folder / "cache"), "--tensorboard-dir", str(folder / "events")),
        *("--tensorboard-log-interval", "1"),
    ]
    subprocess.run(command, check=True)
    seen = read_events(folder / "events")
    return [
        [
            float(seen[f"ep/tokens_per_expert/layer_{layer}/expert_{expert}"][iterations])
            for expert in range(EXPERTS)
        ]
        for layer in range(1, 5)
    ]


def record(shares: list[list[float]], data: Path, iterations: int) -> dict[str, Any]:
    """Return the file's content: the counts of each layer and what made them."""
    choices = SEQUENCE * BATCH * TOPK
    manifest = json.loads((data / "manifest.json").read_text())
    return {
        "made_by": "python benchmarks/record_routing.py",
        "model": " ".join(MODEL.split()),
        "text": {name: manifest[name] for name in ("sha256", "vocab_size")},
        "iteration": iterations,
        "topk": TOPK,
        "date": datetime.now(UTC).date().isoformat(),
        "device": "cpu",
        "versions": versions(),
        "counts": [[round(share * choices) for share in layer] for layer in shares],
    }


def main() -> None:
    """Train, read what was logged, write the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="what prepare_data.py wrote")
    parser.add_argument("--corpus", default="corpus", help="name of its .bin (default: corpus)")
    parser.add_argument("--iterations", type=int, default=140)
    parser.add_argument("--output", type=Path, default=TARGET)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        shares = train(args.data.resolve(), args.corpus, args.iterations, Path(folder))
    content = json.dumps(record(shares, args.data, args.iterations))
    args.output.write_text(content.replace(", [", ",\n[").replace("]]", "]\n]") + "\n")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
