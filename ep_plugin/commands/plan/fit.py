"""The part of `ep-plugin plan` that says whether a preset fits the GPUs of a layout."""

import argparse
import json
from dataclasses import asdict, dataclass

from ep_plugin.commands.flags import Need
from ep_plugin.commands.plan.memory import Memory, split_layers, stage_memory
from ep_plugin.errors import ConfigError
from ep_plugin.moe.parallel import ParallelConfig
from ep_plugin.presets import Preset, load

USABLE = 0.9  # of a GPU's memory; the rest is what is not counted
NEEDS = (
    Need(
        "--gpus --tp --pp --cp --etp --micro-batch --seq-length --recompute --dispatch-dedup "
        "--gpu-gb",
        lambda args: args.preset is not None,
        "{flag} is for the memory of a whole model, and no model is named; use --preset NAME with "
        "a name that `ep-plugin presets` lists",
    ),
    Need(
        "--ep --etp --dispatch-dedup",
        lambda args: args.preset is None or any(load(args.preset).model.experts),
        "{flag} is for experts, and {args.preset} has none; use --tp, --pp and --cp without {flag}",
    ),
)


@dataclass(frozen=True)
class Fit:
    """The fullest stage of a layout."""

    ep: int
    edp: int
    memory: Memory
    total_gb: float
    fits: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the model and its layout."""
    group = parser.add_argument_group("memory", "does a published system fit so many GPUs?")
    group.add_argument("--preset", metavar="NAME", help="see ep-plugin presets")
    numbers = {
        "gpus": (8, "all of them"),
        "tp": (1, "tensor-parallel ranks, with sequence parallelism"),
        "pp": (1, "pipeline stages, of as many layers each as go"),
        "cp": (1, "context-parallel ranks"),
        "etp": (1, "expert tensor-parallel ranks"),
        "micro-batch": (1, "sequences"),
    }
    for name, (default, summary) in numbers.items():
        group.add_argument(
            f"--{name}", type=int, default=default, help=f"{summary} (default: {default})"
        )
    group.add_argument("--seq-length", type=int, help="default: the preset's")
    group.add_argument("--recompute", action="store_true", help="each layer, in the backward")
    group.add_argument("--dispatch-dedup", action="store_true", help="as --ep-dispatch-dedup on")
    group.add_argument(
        "--gpu-gb", type=float, default=80.0, help="memory of one, 10^9 bytes (default: 80)"
    )


def run(args: argparse.Namespace) -> int:
    """Print a row for each --ep, or for each that goes; raises ConfigError."""
    preset = load(args.preset)
    for name in ("micro_batch", "seq_length", "gpu_gb"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise ConfigError(
                f"--{name.replace('_', '-')} must be positive; got {value}; without it the "
                "default is taken"
            )
    rows = [_fit(args, preset, ep) for ep in args.ep] if args.ep else _all(args, preset)
    if args.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        print(_table(rows, args.gpu_gb))
    return 0


def _all(args: argparse.Namespace, preset: Preset) -> list[Fit]:
    """Return the rows of every power of 2 that the experts and the ranks allow."""
    rows = []
    ep = 1
    while ep <= max(1, *preset.model.experts):
        allowed = all(experts % ep == 0 for experts in preset.model.experts)
        if allowed and (args.gpus % (ep * args.etp * args.pp) == 0 or ep == 1):
            rows.append(_fit(args, preset, ep))
        ep *= 2
    return rows


def _fit(args: argparse.Namespace, preset: Preset, ep: int) -> Fit:
    parallel = ParallelConfig(
        world_size=args.gpus, tp=args.tp, pp=args.pp, cp=args.cp, ep=ep, etp=args.etp
    )
    stages = stage_memory(
        preset,
        parallel,
        split_layers(len(preset.model.experts), args.pp),
        micro_batch=args.micro_batch,
        seq_length=args.seq_length,
        recompute=args.recompute,
        dedup=args.dispatch_dedup,
    )
    fullest = max(stages, key=lambda stage: stage.total)
    total = fullest.total / 1e9
    return Fit(ep, parallel.edp, fullest, total, total <= USABLE * args.gpu_gb)


def _table(rows: list[Fit], gpu_gb: float) -> str:
    lines = [
        f"{'ep':>4} {'edp':>4} {'stage':>5} {'dense':>8} {'experts':>8} {'weights GB':>11} "
        f"{'Adam GB':>8} {'activations GB':>15} {'total GB':>9}  fits {gpu_gb:g} GB"
    ]
    for row in rows:
        held = row.memory
        lines.append(
            f"{row.ep:4} {row.edp:4} {held.stage:5} {held.dense_params / 1e9:7.2f}B "
            f"{held.expert_params / 1e9:7.2f}B {held.weights / 1e9:11.1f} "
            f"{held.optimizer / 1e9:8.1f} {held.activations / 1e9:15.1f} {row.total_gb:9.1f}  "
            f"{'yes' if row.fits else 'no'}"
        )
    return "\n".join(lines)
