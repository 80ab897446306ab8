"""Train a model in Megatron's loop, with our MoE blocks and with Megatron's own.

python benchmarks/train_ep.py --ranks 2 [--model gpt-20m] [--precision bf16 fp8]
                              [--iterations 100] [--data data/quickstart] [--layouts ep=2]
                              [--seeds 7 8 9] [--sides ep_plugin graph megatron] [--output F]
                              [--micro-batch 1 2 4] [--num-layers 4 12] [--force-balance]

Models are gpt-20m and every preset (`--num-layers N` keeps as many layers as fit; of two depths
the cost of a layer is printed). All sides get the same flags, data, seeds and initial values, and
with Transformer Engine the fusions and overlaps that are good for all; `train_sides.py` has them,
and those of each side. `megatron-defaults` is Megatron's as its users get it, `megatron-all` has
all of its switches; `graph` is our side with whole iterations in a CUDA graph, `layers` with a
graph of each layer. A side's tokens per second are those of its median iteration after the first
tenth of each run. A side that cannot run is named with the reason. Rows are as `ep-plugin bench`
writes them, with `first_losses`, of each seed before any step, which equal values make equal but
for rounding, and `losses`, the mean of the last tenth. Without a GPU only losses mean anything.
"""

import argparse
import shlex
import statistics
import sys
from itertools import product
from pathlib import Path

import torch
from tqdm import tqdm
from train_run import (
    DEFAULT_MICRO_BATCH,
    Case,
    RunError,
    has_engine,
    model_flags,
    over_ranks,
    own,
    parallel_of,
    run,
)
from train_sides import FORMATS, SIDES, SWITCHES, backend, switches, why_not

from ep_plugin.commands.bench.figures import (
    EMPTY,
    Row,
    device_name,
    hosts_differ,
    identity,
    make_row,
    merge,
    read,
    write,
)
from ep_plugin.commands.bench.measure import Timing
from ep_plugin.errors import ConfigError

PAIRS = (  # whose rows are compared
    *(
        ((ours, precision), (theirs, precision))
        for ours in ("ep_plugin", "graph", "graph-serial", "layers")
        for theirs in SIDES
        if SIDES[theirs].is_peer
        for precision in ("bf16", "fp8")
    ),
    *(((side, "fp8"), (side, "bf16")) for side in SIDES),
)


def train(name: str, precision: str, args: argparse.Namespace, case: Case) -> Row:
    """Run one side with each seed and return its row; raises RunError."""
    fp8 = precision == "fp8"
    recipe = args.fp8_recipe if fp8 else None
    reason = why_not(SIDES[name], over_ranks(case, args), has_engine(), recipe)
    if reason:
        raise RunError(reason)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    what = {
        "bench": "train",
        "shape": case.title(args),
        "op": case.layout,
        "backend": backend(name, recipe, has_engine()),
        "graph": SIDES[name].in_graph,
        "precision": precision,
        "routing": "forced balance" if args.force_balance else "natural",
        "gradients": "added",
        "ep": args.ranks,
    }
    known = identity({**EMPTY, **what, "device": device_name(device)})
    kept = [row for row in read(args.output) if identity(row) == known] if args.resume else []
    if kept:
        return kept[0]
    bars = tqdm(args.seeds, f"{case.layout} {name} {precision}", disable=None, leave=False)
    runs = [run(name, fp8, seed, args, case) for seed in bars]
    steady = sorted(ms for each in runs for ms in each.steady)
    median = statistics.median(steady)
    return make_row(
        device,
        Timing(median, steady[len(steady) // 10], steady[-1 - len(steady) // 10]),
        **what,
        switches=switches(SIDES[name], own(name, fp8, args, case), args.without),
        attention=runs[0].attention,
        run=size_flags(args),
        tokens_per_second=runs[0].tokens / median * 1000,
        first_losses=[round(each.first, 6) for each in runs],
        losses=[round(each.loss, 6) for each in runs],
    )


def size_flags(args: argparse.Namespace) -> str:
    """Return the flags of a row's size that are not in its names."""
    sequence = [] if args.sequence is None else ["--sequence", str(args.sequence)]
    data = [] if args.data is None else ["--data", str(args.data)]
    words = [*sequence, *data, "--batch", str(args.batch), "--iterations", str(args.iterations)]
    return shlex.join([*words, "--seeds", *map(str, args.seeds)])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--model", default="gpt-20m")
    parser.add_argument(
        *("--num-layers", "--depths"), dest="depths", nargs="+", type=int, default=[None],
        help="of a preset: as many as fit; of two depths the cost of a layer is printed",
    )  # fmt: skip
    parser.add_argument("--sequence", type=int, help="tokens of a sequence, other than the model's")
    parser.add_argument("--layouts", nargs="+", help="such as tp=2,ep=4 (default: ep=RANKS)")
    parser.add_argument("--precision", nargs="+", default=["bf16"], choices=["bf16", "fp8"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[7])
    parser.add_argument("--sides", nargs="+", default=["ep_plugin", "megatron"], choices=SIDES)
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--micro-batch", nargs="+", type=int, default=[DEFAULT_MICRO_BATCH])
    parser.add_argument("--force-balance", action="store_true", help="on all sides")
    parser.add_argument("--fp8-recipe", default="tensorwise", choices=FORMATS, help="Megatron's")
    parser.add_argument(
        *("--without",), nargs="+", default=[], choices=SWITCHES, type=lambda name: f"--{name}",
        metavar="SWITCH", help="leave flags of all sides out, such as overlap-param-gather",
    )  # fmt: skip
    parser.add_argument("--minutes", type=float, help="of one run: one that takes longer is ended")
    parser.add_argument("--batch", type=int, default=32, help="sequences of an iteration")
    parser.add_argument("--data", type=Path, help="what prepare_data.py wrote (default: mock data)")
    parser.add_argument("--logs", type=Path, default=Path("runs/train_ep"))
    parser.add_argument("--output", type=Path, help="JSON; equal rows are replaced")
    parser.add_argument("--resume", action="store_true", help="keep the rows of --output")
    args = parser.parse_args()
    args.layouts = args.layouts or [f"ep={args.ranks}"]
    return args


def compare(case: Case, args: argparse.Namespace) -> dict[tuple[str, str], Row]:
    """Train what was asked for in one case; print each as it comes and then pairs, write rows."""
    rows: dict[tuple[str, str], Row] = {}
    at = f"{case.title(args)}, {case.layout}"
    for precision, side in product(args.precision, args.sides):
        try:
            row = rows[side, precision] = train(side, precision, args, case)
        except RunError as error:
            print(f"{at} {side} {precision} not measured: {error}", flush=True)
            continue
        speed = "" if row["device"] == "cpu" else f" {row['tokens_per_second']:9.0f} tokens/s"
        both = zip(row["first_losses"], row["losses"], strict=True)
        losses = " ".join(f"{first:.4f} to {last:.4f}" for first, last in both)
        said = f"attention {row.get('attention', 'not said')}; {row.get('switches') or 'no switch'}"
        print(f"{at} {side:10} {precision} loss {losses}{speed} ({said})", flush=True)
        if args.output is not None:
            write(args.output, merge(read(args.output), [row]))
    for name, other in PAIRS:
        if name in rows and other in rows:
            print(f"{at} {' '.join(name)}: {beside(rows[name], rows[other])} {' '.join(other)}")
    for precision in args.precision:
        print_peer(at, precision, {s: r for (s, p), r in rows.items() if p == precision})
    return rows


def print_peer(at: str, precision: str, rows: dict[str, Row]) -> None:
    """Print Megatron's two figures: as its users get it, and the best, with the switches."""
    theirs = {side: row for side, row in rows.items() if SIDES[side].is_peer}
    if not theirs or next(iter(theirs.values()))["device"] == "cpu":
        return
    whole = [row for side, row in theirs.items() if not SIDES[side].drops] or [*theirs.values()]
    best = max(whole, key=lambda row: float(row["tokens_per_second"]))
    for told, row in (("as its users get it", theirs.get("megatron-defaults")), ("best", best)):
        figure = "not measured" if row is None else f"{row['tokens_per_second']:.0f} tokens/s"
        which = "" if row is None else f" ({row.get('switches') or 'no switch'})"
        print(f"{at} Megatron {precision} {told}: {figure}{which}", flush=True)


def layer_cost(shallow: Row, deep: Row, layers: int, tokens: int, ranks: int) -> float:
    """Return microseconds of one layer for each token of a GPU; its optimizer step included.

    Rows of two depths, `layers` apart, with as many `tokens` an iteration over so many `ranks`.
    """
    return float(1e3 * (deep["ms"] - shallow["ms"]) / layers / (tokens / ranks))


def beside(row: Row, other: Row) -> str:
    """Return how a row's speed and losses differ from another's, seed by seed."""
    percent = [100 * (a / b - 1) for a, b in zip(row["losses"], other["losses"], strict=True)]
    loss = f"loss {statistics.mean(percent):+.2f} %"
    if len(percent) > 1:
        loss += f" (standard error {statistics.stdev(percent) / len(percent) ** 0.5:.2f})"
    ratio = row["tokens_per_second"] / other["tokens_per_second"]
    speed = "" if row["device"] == "cpu" else f"{ratio:.2f} x tokens per second, "
    return f"{speed}{loss}{_of_two_hosts(row, other)} beside"


def _of_two_hosts(row: Row, other: Row) -> str:
    differ = row["device"] != "cpu" and hosts_differ(row, other)
    return " (speeds may be of two hosts, and not compare)" if differ else ""


def print_layers(found: dict[Case, dict[tuple[str, str], Row]], args: argparse.Namespace) -> None:
    """Print what a layer costs, of each side that was measured at two depths."""
    shallow, deep = min(args.depths), max(args.depths)
    for case, rows in found.items():
        if case.depth != shallow:
            continue
        model = model_flags(args.model, case.depth, args.sequence)
        tokens = args.batch * int(model[model.index("--seq-length") + 1])
        for name, row in rows.items():
            other = found.get(case._replace(depth=deep), {}).get(name)
            if other is not None and row["device"] != "cpu":
                cost = layer_cost(row, other, deep - shallow, tokens, args.ranks)
                print(
                    f"{case.title(args)} to {deep} layers, {case.layout} {' '.join(name)}: a layer "
                    f"costs {cost:.3f} microseconds a token and GPU{_of_two_hosts(row, other)}"
                )


def main() -> None:
    """Compare all sides in every layout, depth, micro-batch and precision."""
    args = parse()
    try:
        for layout in args.layouts:
            parallel_of(layout, args.ranks)
        fp8_peers = [side for side in args.sides if SIDES[side].is_peer]
        if "fp8" in args.precision and fp8_peers and not has_engine():
            raise ConfigError(
                f"--precision fp8 of side {fp8_peers[0]} needs a GPU and transformer_engine; use "
                "--sides ep_plugin"
            )
        check_batches(args)
        if args.resume and args.output is None:
            raise ConfigError("--resume needs --output, whose rows it keeps; use --output FILE")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    args.logs.mkdir(parents=True, exist_ok=True)
    cases = [Case(*of) for of in product(args.layouts, args.depths, args.micro_batch)]
    found = {case: compare(case, args) for case in cases}
    if len(args.depths) > 1:
        print_layers(found, args)
    wanted = {side for side in args.sides if not SIDES[side].is_peer} or set(args.sides)
    if not all({side for side, _ in rows} & wanted for rows in found.values()):
        sys.exit(1)


def check_batches(args: argparse.Namespace) -> None:
    """Raise ConfigError for a --micro-batch that does not divide --batch over the ranks."""
    for layout in args.layouts:
        parallel = parallel_of(layout, args.ranks)
        replicas = args.ranks // (parallel.tp * parallel.pp)
        for micro_batch in args.micro_batch:
            if micro_batch < 1 or args.batch % (micro_batch * replicas):
                raise ConfigError(
                    f"--batch ({args.batch}) must be a multiple of --micro-batch ({micro_batch}) "
                    f"times the data-parallel ranks of {layout} ({replicas}); use --batch "
                    f"{max(1, micro_batch) * replicas}"
                )
    if len(args.depths) > 2 or None in args.depths[1:]:
        raise ConfigError(
            f"--num-layers takes one depth or two; got {len(args.depths)}; use --num-layers 4 12"
        )


if __name__ == "__main__":
    main()
