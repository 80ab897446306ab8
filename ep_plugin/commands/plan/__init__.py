"""`ep-plugin plan`: the communication time of a layer, or the memory of a model.

The model is a --preset, or a HybridModel by its --hybrid-layer-pattern.
"""

import argparse
import json
from dataclasses import asdict
from math import lcm
from pathlib import Path
from typing import Any

from ep_plugin.commands.law import Need
from ep_plugin.commands.plan import fit, hybrid_flags, hybrid_plan
from ep_plugin.commands.plan.network import (
    HOWS,
    NETWORKS,
    ONE_DOMAIN,
    Network,
    Traffic,
    forecast,
    goes,
)
from ep_plugin.commands.plan.row_types import Measured
from ep_plugin.commands.plan.show import draw, table
from ep_plugin.errors import ConfigError
from ep_plugin.untrusted import cut, read_json

SENT_AS = {"alltoall": "flat", "alltoall+dedup": "dedup", "hierarchical": "hierarchical"}
SENT_IN_A_GRAPH = {"serial": "symm_mem", "chunked": "swaps"}  # through symm_mem, by its schedule
EXAMPLES = """examples:
  ep-plugin plan --tokens 8192 --topk 8 --hidden 7168 --experts 256 --compute-ms 10
  ep-plugin plan --topk 8 --hidden 2048 --experts 128 --ep 2 4 8 --network nvlink72 --json
  ep-plugin plan --topk 8 --hidden 2048 --ffn 768 --experts 128    compute by its floor
  ep-plugin plan --preset qwen3-30b-a3b --gpus 16 --pp 2      memory of a GPU, for each ep
  ep-plugin plan --preset ds-350m-mos-l21 --ep-teacher ds-350m-prmoe-32-64     with a teacher
  ep-plugin plan --hybrid-layer-pattern 'M*ME|M*ME' --hidden-size 2048 --num-attention-heads 16 \\
      --num-experts 64 --vocab-size 131072 --seq-length 4096 --position-embedding-type none
  ep-plugin plan --experts 512 --ep 8 64 512 --chunks 8 --fp8-dispatch --plot plan.png
  ep-plugin plan --topk 4 --ep 2 4 8 --measured overlap.json --plot plan.png

--compute-ms is the time of the layer without communication, ms of `ep-plugin bench layer`. With
--ffn it is the floor of such a layer, as `bench layer --explain` counts it: no layer is faster.
The assumptions are listed in ep_plugin/commands/plan/network.py and, of memory, in memory.py."""

SPELLING = {  # a setting in a refusal -> the flag that it has here
    **{name: f"--{name}" for name in ("tp", "pp", "cp", "ep", "etp", "experts")},
    **{name: f"--{name}" for name in ("tokens", "topk", "hidden", "imbalance")},
    **{"world_size": "--gpus", "num_experts": "the number of experts"},
}
NEEDS = (
    Need(
        "--tokens",
        fit.no_model,
        "--tokens is for the exchanges of a layer, and a model's memory is asked for; use "
        "--micro-batch N and --seq-length N",
    ),
    Need(
        "--topk --hidden --ffn --experts --chunks --compute-ms --imbalance --network "
        "--fp8-dispatch --measured --plot",
        fit.no_model,
        "{flag} is for the exchanges of a layer, and --preset or --hybrid-layer-pattern asks for a "
        "model's memory; use {flag} without them, or leave {flag} out",
    ),
    Need(
        "--compute-ms",
        lambda args: args.ffn is None,
        "--compute-ms is the time of a step, which --ffn {args.ffn} would count; use --compute-ms "
        "without --ffn",
    ),
    Need(
        "--measured",
        lambda args: not args.json or args.plot is not None,
        "--measured is shown in the table and in the plot, and --json prints neither; use --plot "
        "FILE, or --measured without --json",
    ),
    *fit.NEEDS,
    *hybrid_flags.NEEDS,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the layer is, and where it would run."""
    numbers = {
        "tokens": (8192, "tokens of one rank in one micro-batch"),
        "topk": (8, "experts that a token is sent to"),
        "hidden": (7168, "hidden size"),
        "experts": (256, "experts of the layer"),
        "chunks": (
            4,
            "parts that the tokens are split into, to overlap communication; 1 hides nothing",
        ),
    }
    for name, (default, summary) in numbers.items():
        parser.add_argument(
            f"--{name}", type=int, default=default, help=f"{summary} (default: {default})"
        )
    parser.add_argument(
        "--compute-ms",
        type=float,
        default=10.0,
        help="time of a step without communication (default: 10)",
    )
    parser.add_argument(
        "--ffn",
        type=int,
        help="FFN of an expert: in place of --compute-ms, the floor of the layer on one H100, in "
        "bf16, gradients added in fp32",
    )
    parser.add_argument(
        "--imbalance",
        type=float,
        default=1.0,
        help="load of the busiest rank over the mean load (default: 1)",
    )
    parser.add_argument(
        "--ep",
        type=int,
        nargs="+",
        metavar="N",
        help="expert-parallel ranks (default: the powers of 2 up to 256 that divide the experts)",
    )
    parser.add_argument(
        "--network",
        choices=NETWORKS,
        default="nvlink8",
        help="GPUs that share NVLink: 8 or 72 (default: nvlink8)",
    )
    parser.add_argument(
        "--fp8-dispatch", action="store_true", help="dispatch tokens in FP8, one byte a value"
    )
    parser.add_argument("--json", action="store_true", help="print the rows on stdout as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the rows as a PNG")
    parser.add_argument(
        "--measured",
        type=Path,
        metavar="FILE",
        help="JSON of `bench overlap`; its rows of this layer are shown beside the estimate",
    )
    fit.add_arguments(parser)
    hybrid_flags.add_arguments(
        parser.add_argument_group(
            "a HybridModel", "its layers by Megatron's flags; memory as above, and work"
        )
    )


def run(args: argparse.Namespace) -> int:
    """Print a row for each number of ranks and each way to send; raises ConfigError.

    With a model, a row for each number of ranks and what a GPU holds.
    """
    if args.hybrid_layer_pattern is not None:
        return hybrid_plan.run(args)
    if args.preset is not None:
        return fit.run(args)
    names = ("tokens", "topk", "hidden", "experts", "chunks", "compute_ms", "imbalance", "ffn")
    for name in names:
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            flag = name.replace("_", "-")
            least = _least_experts(args) if name == "experts" else 1
            raise ConfigError(
                f"--{flag} must be positive; got {getattr(args, name)}; use --{flag} {least}"
            )
    if args.imbalance < 1:
        raise ConfigError(
            f"--imbalance is the busiest rank's load over the mean, 1 at least; got "
            f"{args.imbalance}; use --imbalance 1"
        )
    if args.topk > args.experts:
        even = all(ep > 0 and args.experts % ep == 0 for ep in args.ep or [])
        use = f"--topk {args.experts}" if even else f"--experts {_least_experts(args)}"
        raise ConfigError(
            f"--topk ({args.topk}) must be at most --experts ({args.experts}); use {use}"
        )
    traffic = Traffic(
        args.tokens,
        args.topk,
        args.hidden,
        args.experts,
        dispatch_bytes=1.0 if args.fp8_dispatch else 2.0,
        imbalance=args.imbalance,
    )
    network = NETWORKS[args.network]
    powers = [2**n for n in range(1, 9)]
    args.ep = args.ep or [ep for ep in powers if goes(args.experts, ep, network.domain)] or [1]
    rows = [
        forecast(traffic, network, ep, how, _compute_ms(args, ep), args.chunks)
        for ep in args.ep
        for how in (*HOWS, *(ONE_DOMAIN if ep <= network.domain else ()))
    ]
    measured = _measured(args, traffic) if args.measured is not None else []
    if args.plot is not None:
        draw(rows, measured, args)
    print(json.dumps([asdict(row) for row in rows], indent=1) if args.json else table(rows))
    if measured and not args.json:
        print(_beside(measured, traffic, network))
    return 0


def _compute_ms(args: argparse.Namespace, ep: int) -> float:
    """Return the milliseconds of a step without communication where `ep` ranks share the experts.

    Raises ConfigError where they do not divide them, as `forecast` does.
    """
    if args.ffn is None or ep < 1 or args.experts % ep:
        return float(args.compute_ms)
    from ep_plugin.commands.bench.floors import H100, Work, floor_ms
    from ep_plugin.commands.bench.shapes import Shape

    sizes = args.tokens, args.topk, args.hidden, args.ffn, args.experts // ep
    return floor_ms(Work(Shape("of plan", *sizes), "bf16", "added", ranks=ep), H100)


def _least_experts(args: argparse.Namespace) -> int:
    """Return the smallest number of experts for --topk that every --ep divides."""
    step = lcm(*(ep for ep in args.ep or [1] if ep > 0))
    return -(-int(args.topk) // step) * step


def _measured(args: argparse.Namespace, traffic: Traffic) -> list[Measured]:
    """Return the exchanges in --measured; raises ConfigError when none is for one of --ep."""
    found = read_measured(args.measured, traffic)
    ranks = sorted({row.ep for row in found})
    if not set(ranks) & set(args.ep):
        raise ConfigError(
            f"--measured {args.measured} has rows for --ep {' '.join(map(str, ranks))}, none for "
            f"--ep {' '.join(map(str, args.ep))}; use --ep {ranks[0]}"
        )
    return found


def read_measured(path: Path, traffic: Traffic) -> list[Measured]:
    """Return the bf16 exchanges of `bench overlap` for such a layer; raises ConfigError.

    Of `symm_mem` those in a CUDA graph: else the time is that of the host's launches.
    """
    dims = {"tokens": traffic.tokens, "topk": traffic.topk, "hidden": traffic.hidden}
    rows = read_json(path, "use the --output of `bench overlap`", list)
    try:
        found = [
            Measured(row["ep"], how, row["exchange_ms"], row["hidden_share"])
            for row in rows
            if row["bench"] == "overlap"
            and row["precision"] == "bf16"
            and row["exchange_ms"] is not None
            and row["dims"] == dims
            and (how := sent_as(row)) is not None
        ]
    except (KeyError, TypeError, AttributeError, ConfigError) as error:
        raise ConfigError(
            f"--measured {path} is no file of `bench overlap` ({cut(repr(error))}); use its "
            "--output"
        ) from error
    if not found:
        raise ConfigError(
            f"--measured {path} has no bf16 row with tokens {traffic.tokens}, topk {traffic.topk}, "
            f"hidden {traffic.hidden}; use the flags of what was measured"
        )
    return found


def sent_as(row: dict[str, Any]) -> str | None:
    """Return how a row's tokens went, in the model's words; None for one that it does not have."""
    if row["dispatcher"] == "symm_mem" and row["graph"]:
        return SENT_IN_A_GRAPH.get(row["schedule"])
    return SENT_AS.get(row["dispatcher"])


def _beside(measured: list[Measured], traffic: Traffic, network: Network) -> str:
    """Return a line for each measured exchange, with what is foreseen of it."""
    lines = ["measured, over what is foreseen:"]
    for ep, how, exchange in dict.fromkeys((r.ep, r.how, r.exchange_ms) for r in measured):
        foreseen = forecast(traffic, network, ep, how, 1.0, 1).exchange_ms
        lines.append(f"{ep:4} {how:13} {exchange:12.2f} ms {exchange / foreseen:6.2f}")
    return "\n".join(lines)
