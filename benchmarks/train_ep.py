"""Train a model in Megatron's loop, with our MoE blocks and with Megatron's own.

python benchmarks/train_ep.py --ranks 2 [--model gpt-20m] [--precision bf16 fp8]
                              [--iterations 100] [--data data/quickstart] [--layouts ep=2]
                              [--seeds 7 8 9] [--sides ep_plugin graph megatron] [--output F]

Models are gpt-20m and every preset (`--num-layers N` keeps as many layers as fit). Both sides get
the same flags, data, seeds and initial values; Megatron's own side is given its best: grouped GEMM
with Transformer Engine where that is installed, and its sequential experts otherwise. A side's
tokens per second are those of its median iteration after the first tenth of each run. `graph` is
our side with whole iterations in a CUDA graph. Rows are as `ep-plugin bench` writes them, with
`first_losses`, of each seed before any step, which equal values make equal but for rounding, and
`losses`, the mean of the last tenth. Without a GPU only losses mean anything.
"""

import argparse
import json
import re
import shlex
import statistics
import subprocess
import sys
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from ep_plugin.commands.bench.figures import Row, make_row, merge, read, write
from ep_plugin.commands.bench.measure import Timing
from ep_plugin.errors import ConfigError
from ep_plugin.moe.parallel import ParallelConfig

ROOT = Path(__file__).parents[1]
SCRIPT = str(ROOT / "recipes" / "pretrain_gpt.py")
GPT_20M = """
--num-layers 4 --hidden-size 384 --ffn-hidden-size 1024 --num-attention-heads 6 --seq-length 512
--max-position-embeddings 512 --position-embedding-type rope --swiglu --disable-bias-linear
--untie-embeddings-and-output-weights --normalization RMSNorm --attention-dropout 0
--hidden-dropout 0 --num-experts 8 --moe-router-topk 2 --moe-ffn-hidden-size 384
--moe-aux-loss-coeff 1e-2
"""
RUN = """
--moe-token-dispatcher-type alltoall --lr 1e-3 --min-lr 1e-4 --lr-decay-style cosine
--lr-warmup-fraction 0.1 --weight-decay 0.1 --clip-grad 1.0 --num-workers 0 --bf16
--log-interval 1 --eval-iters 0 --eval-interval 100000 --use-distributed-optimizer
--tokenizer-type NullTokenizer --moe-router-dtype fp32
"""
PLAIN = """
--transformer-impl local --no-masked-softmax-fusion --no-persist-layer-norm --no-rope-fusion
"""
FUSED = "--transformer-impl transformer_engine --moe-grouped-gemm"
UNFUSED_TOTALS = "--no-gradient-accumulation-fusion"  # Megatron's output layer has it from apex


class Side(NamedTuple):
    """How a side is started, and the flags that are its own."""

    runner: tuple[str, ...]
    flags: str = ""
    over_ranks: str = ""  # with experts on more than one rank
    fused: str = ""  # with Transformer Engine
    fp8: str = "--ep-fp8 rowwise"


OURS = ("-m", "ep_plugin.run")
GRAPH = "--cuda-graph-impl full_iteration --no-check-for-nan-in-loss-and-grad"
SIDES = {
    "ep_plugin": Side(OURS, over_ranks="--ep-dispatcher symm_mem"),
    "graph": Side(OURS, GRAPH, over_ranks="--ep-dispatcher symm_mem --ep-overlap chunked"),
    "megatron": Side(
        (str(ROOT / "tests" / "helpers" / "stock_run.py"),),
        fused="--moe-permute-fusion",
        fp8="--fp8-format e4m3 --fp8-recipe tensorwise",
    ),
}
PAIRS = (  # whose rows are compared
    *(
        ((ours, precision), ("megatron", precision))
        for ours in ("ep_plugin", "graph")
        for precision in ("bf16", "fp8")
    ),
    *(((side, "fp8"), (side, "bf16")) for side in SIDES),
)
ITERATION = re.compile(r"elapsed time per iteration \(ms\): ([\d.]+).*?lm loss: (\S+)")


class Run(NamedTuple):
    """What one run's log says."""

    steady: list[float]  # milliseconds of iterations after the first tenth
    first: float  # loss: of equal initial values
    loss: float  # mean of the last tenth
    tokens: int  # of an iteration


def has_engine() -> bool:
    """Whether Transformer Engine is here, and a GPU for it."""
    return find_spec("transformer_engine") is not None and torch.cuda.is_available()


def model_flags(name: str, num_layers: int | None, sequence: int | None) -> list[str]:
    """Return Megatron's flags of a model, with as many layers as asked for."""
    if name == "gpt-20m":
        flags = shlex.split(GPT_20M)
    else:
        command = [sys.executable, "-m", "ep_plugin.cli", "presets", name, "--json"]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        flags = json.loads(printed)["arguments"]
    changes = {"--num-layers": num_layers, "--seq-length": sequence}
    if num_layers is not None and "--moe-layer-freq" in flags:
        changes["--moe-layer-freq"] = 1
    if sequence is not None:
        changes["--max-position-embeddings"] = sequence
    for flag, value in changes.items():
        if value is not None:
            flags[flags.index(flag) + 1] = str(value)
    return flags


def parallel_of(layout: str, ranks: int) -> ParallelConfig:
    """Return a layout such as tp=2,ep=4; raises ConfigError where it is none."""
    parts = [part.partition("=") for part in layout.split(",")]
    if not all(key in ("tp", "pp", "ep", "etp") and size.isdecimal() for key, _, size in parts):
        raise ConfigError(f"--layouts takes tp, pp, ep, etp, as tp=2,ep=4; got {layout!r}")
    sizes = {key: int(size) for key, _, size in parts}
    return ParallelConfig(world_size=ranks, **{"etp": 1, **sizes})


def layout_flags(parallel: ParallelConfig) -> list[str]:
    """Return the flags of a layout."""
    flags = [
        *("--tensor-model-parallel-size", str(parallel.tp)),
        *("--pipeline-model-parallel-size", str(parallel.pp)),
        *("--expert-model-parallel-size", str(parallel.ep)),
        *("--expert-tensor-parallel-size", str(parallel.expert_tp)),
    ]
    return [*flags, "--sequence-parallel"] if parallel.tp > 1 else flags


def data_flags(data: Path | None, log: Path) -> list[str]:
    """Return the flags of real text that recipes/prepare_data.py wrote, or of mock data."""
    if data is None:
        return ["--mock-data", "--vocab-size", "8192"]
    vocabulary = json.loads((data / "manifest.json").read_text())["vocab_size"]
    return [
        *("--data-path", str(data / "corpus"), "--split", "95,5,0"),
        *("--vocab-size", str(vocabulary), "--data-cache-path", str(log.parent / "cache")),
    ]


def run(name: str, fp8: bool, seed: int, args: argparse.Namespace, layout: str) -> Run:
    """Train one side with one seed; one that fails shows the end of its log."""
    side, parallel = SIDES[name], parallel_of(layout, args.ranks)
    own = [
        side.flags,
        side.over_ranks if parallel.ep * parallel.expert_tp > 1 else "",
        side.fused if has_engine() else "",
        side.fp8 if fp8 else "",
    ]
    precision = "fp8" if fp8 else "bf16"
    log = args.logs / f"{args.model}_{layout}_{name}_{precision}_seed{seed}.log"
    model = model_flags(args.model, args.num_layers, args.sequence)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(args.ranks), *side.runner, SCRIPT, *model, *shlex.split(RUN)),
        *shlex.split(FUSED if has_engine() else PLAIN),
        *([] if find_spec("fused_weight_gradient_mlp_cuda") else [UNFUSED_TOTALS]),
        *layout_flags(parallel),
        *("--micro-batch-size", str(args.micro_batch), "--global-batch-size", str(args.batch)),
        *("--train-iters", str(args.iterations), "--seed", str(seed), *data_flags(args.data, log)),
        *shlex.split(" ".join(own)),
    ]
    with log.open("w") as out:
        code = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, check=False).returncode
    text = log.read_text()
    if code != 0:
        sys.exit(f"{name} ended with {code}; the end of {log}:\n{text[-3000:]}")
    found = [(float(ms), float(loss)) for ms, loss in ITERATION.findall(text)]
    steady = [ms for ms, _ in found[len(found) // 10 :]]
    tenth = max(1, len(found) // 10)
    sequence = int(model[model.index("--seq-length") + 1])
    last = statistics.mean(loss for _, loss in found[-tenth:])
    return Run(steady, found[0][1], last, args.batch * sequence)


def train(name: str, precision: str, args: argparse.Namespace, layout: str) -> Row:
    """Run one side with each seed and return its row."""
    bars = tqdm(args.seeds, f"{layout} {name} {precision}", disable=None, leave=False)
    runs = [run(name, precision == "fp8", seed, args, layout) for seed in bars]
    steady = sorted(ms for each in runs for ms in each.steady)
    median = statistics.median(steady)
    kind = "te" if has_engine() else "sequential experts"
    return make_row(
        torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        Timing(median, steady[len(steady) // 10], steady[-1 - len(steady) // 10]),
        bench="train",
        shape=args.model if args.num_layers is None else f"{args.model}, {args.num_layers} layers",
        op=layout,
        backend=f"megatron ({kind})" if name == "megatron" else "ep_plugin",
        graph=name == "graph",
        precision=precision,
        ep=args.ranks,
        tokens_per_second=runs[0].tokens / median * 1000,
        first_losses=[round(each.first, 6) for each in runs],
        losses=[round(each.loss, 6) for each in runs],
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--model", default="gpt-20m")
    parser.add_argument("--num-layers", type=int, help="of a preset: as many as fit")
    parser.add_argument("--sequence", type=int, help="tokens of a sequence, other than the model's")
    parser.add_argument("--layouts", nargs="+", help="such as tp=2,ep=4 (default: ep=RANKS)")
    parser.add_argument("--precision", nargs="+", default=["bf16"], choices=["bf16", "fp8"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[7])
    parser.add_argument("--sides", nargs="+", default=["ep_plugin", "megatron"], choices=SIDES)
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--batch", type=int, default=32, help="sequences of an iteration")
    parser.add_argument("--data", type=Path, help="what prepare_data.py wrote (default: mock data)")
    parser.add_argument("--logs", type=Path, default=Path("runs/train_ep"))
    parser.add_argument("--output", type=Path, help="JSON; equal rows are replaced")
    args = parser.parse_args()
    args.layouts = args.layouts or [f"ep={args.ranks}"]
    return args


def compare(layout: str, args: argparse.Namespace) -> None:
    """Train what was asked for in one layout; print each as it comes and then pairs, write rows."""
    rows: dict[tuple[str, str], Row] = {}
    for precision, side in product(args.precision, args.sides):
        row = rows[side, precision] = train(side, precision, args, layout)
        speed = "" if row["device"] == "cpu" else f" {row['tokens_per_second']:9.0f} tokens/s"
        both = zip(row["first_losses"], row["losses"], strict=True)
        losses = " ".join(f"{first:.4f} to {last:.4f}" for first, last in both)
        print(f"{layout} {side:10} {precision} loss {losses}{speed}", flush=True)
        if args.output is not None:
            write(args.output, merge(read(args.output), [row]))
    for name, other in PAIRS:
        if name in rows and other in rows:
            print(f"{layout} {' '.join(name)}: {beside(rows[name], rows[other])} {' '.join(other)}")


def beside(row: Row, other: Row) -> str:
    """Return how a row's speed and losses differ from another's, seed by seed."""
    percent = [100 * (a / b - 1) for a, b in zip(row["losses"], other["losses"], strict=True)]
    loss = f"loss {statistics.mean(percent):+.2f} %"
    if len(percent) > 1:
        loss += f" (standard error {statistics.stdev(percent) / len(percent) ** 0.5:.2f})"
    ratio = row["tokens_per_second"] / other["tokens_per_second"]
    speed = "" if row["device"] == "cpu" else f"{ratio:.2f} x tokens per second, "
    return f"{speed}{loss} beside"


def main() -> None:
    """Compare both sides in every layout and precision."""
    args = parse()
    try:
        for layout in args.layouts:
            parallel_of(layout, args.ranks)
        if "fp8" in args.precision and "megatron" in args.sides and not has_engine():
            raise ConfigError(
                "--precision fp8 of side megatron needs a GPU and transformer_engine; use "
                "--sides ep_plugin"
            )
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    args.logs.mkdir(parents=True, exist_ok=True)
    for layout in args.layouts:
        compare(layout, args)


if __name__ == "__main__":
    main()
