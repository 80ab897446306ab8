"""The part of `ep-plugin plan` that says whether a preset fits the GPUs of a layout."""

import argparse
import json
from dataclasses import asdict
from math import lcm
from typing import Any

from ep_plugin.commands.law import Need
from ep_plugin.commands.plan import teachers_model
from ep_plugin.commands.plan.memory import USABLE, split_layers, stage_memory
from ep_plugin.commands.plan.row_types import Fit
from ep_plugin.commands.plan.show import fit_table
from ep_plugin.commands.plan.taught import table as teacher_table
from ep_plugin.commands.plan.taught import taught
from ep_plugin.commands.plan.teachers_model import Teacher, read_teacher
from ep_plugin.errors import ConfigError, largest_divisor
from ep_plugin.moe.auto import saves_rows
from ep_plugin.moe.parallel import ParallelConfig
from ep_plugin.presets import Preset, load

MOST = {  # what is refused looks for a layout that goes
    **dict.fromkeys(("gpus", "tp", "pp", "cp", "etp"), 1 << 18),
    "micro_batch": 1 << 20,
}


def no_model(args: argparse.Namespace) -> bool:
    """Whether neither a preset nor a pattern of layers is named."""
    return args.preset is None and args.hybrid_layer_pattern is None


NEEDS = (
    Need(
        "--gpus --tp --pp --cp --etp --micro-batch --seq-length --recompute --dispatch-dedup "
        "--gpu-gb",
        lambda args: not no_model(args),
        "{flag} is for the memory of a whole model, and no model is named; use --preset NAME with "
        "a name that `ep-plugin presets` lists, or --hybrid-layer-pattern PATTERN",
    ),
    Need(
        "--ep-teacher",
        lambda args: args.preset is not None,
        "{flag} teaches a published GPT, and no --preset is named; use --preset NAME with a name "
        "that `ep-plugin presets` lists",
    ),
    Need(
        "--ep --etp --dispatch-dedup",
        lambda args: args.preset is None or any(load(args.preset).model.experts),
        "{flag} is for experts, and {args.preset} has none; use --tp, --pp and --cp without {flag}",
    ),
    *teachers_model.NEEDS,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the model and its layout."""
    group = parser.add_argument_group("memory", "does a published system fit so many GPUs?")
    group.add_argument("--preset", metavar="NAME", help="model: a name of ep-plugin presets")
    numbers = {
        "gpus": (8, "GPUs in all"),
        "tp": (1, "tensor-parallel ranks, with sequence parallelism"),
        "cp": (1, "context-parallel ranks"),
        "etp": (1, "expert tensor-parallel ranks"),
        "micro-batch": (1, "sequences of a micro-batch"),
    }
    for name, (default, summary) in numbers.items():
        group.add_argument(
            f"--{name}", type=int, default=default, help=f"{summary} (default: {default})"
        )
    group.add_argument(
        "--pp",
        type=int,
        help="pipeline stages; a preset's layers are split evenly (default: 1, or as many as "
        "| cuts a pattern into)",
    )
    group.add_argument(
        "--seq-length", type=int, help="tokens of a sequence (default: the preset's)"
    )
    group.add_argument(
        "--recompute", action="store_true", help="recompute each layer in the backward"
    )
    group.add_argument(
        "--dispatch-dedup",
        choices=("on", "off"),
        help="as --ep-dispatch-dedup (default: as --ep-dispatcher auto does between hosts)",
    )
    group.add_argument(
        "--gpu-gb", type=float, default=80.0, help="memory of one GPU in 10^9 bytes (default: 80)"
    )
    teachers_model.add_arguments(group)


def run(args: argparse.Namespace) -> int:
    """Print a row for each --ep, or for each that goes; raises ConfigError."""
    preset = load(args.preset)
    args.pp = 1 if args.pp is None else args.pp
    _check(args, preset)
    teacher = read_teacher(args, preset) if args.ep_teacher is not None else None
    rows = _rows(args, preset, teacher)
    if args.json:
        print(json.dumps([_as_json(row) for row in rows], indent=1))
    else:
        print(fit_table(rows, args.gpu_gb))
        beside = [(row.ep, row.teacher) for row in rows if row.teacher is not None]
        if beside:
            print(teacher_table(beside, args.ep_distill_stop))
    return 0


def _rows(args: argparse.Namespace, preset: Preset, teacher: Teacher | None) -> list[Fit]:
    """Return a row for each --ep, or for each that goes with the model and with its teacher."""
    if args.ep:
        return [_fit(args, preset, ep, teacher) for ep in args.ep]
    rows, refused = [], None
    for ep in (ep for ep in _powers(preset) if ep == 1 or _goes(args, preset, ep)):
        try:
            rows.append(_fit(args, preset, ep, teacher))
        except ConfigError as error:
            refused = refused or error
    if refused is not None and not rows:
        raise refused
    return rows


def _as_json(row: Fit) -> dict[str, Any]:
    found = asdict(row)
    if row.teacher is None:
        del found["teacher"]
    return found


def _check(args: argparse.Namespace, preset: Preset) -> None:
    """Raise ConfigError for a layout that the model's sizes or the GPUs do not allow."""
    numbers = "gpus", "tp", "pp", "cp", "etp", "micro_batch", "seq_length", "gpu_gb"
    for name in numbers:
        value = getattr(args, name)
        if value is not None and value <= 0:
            flag = _flag(name)
            least = _gpus(args, preset) if name == "gpus" else preset.seq_length
            use = least if name in ("gpus", "seq_length") else 1
            raise ConfigError(f"{flag} must be positive; got {value}; use {flag} {use}")
        if value is not None and name in MOST and value > MOST[name]:
            raise ConfigError(
                f"{_flag(name)} must be at most {MOST[name]}; got {value}; use a smaller one"
            )
    heads, layers = preset.model.heads, len(preset.model.experts)
    length = args.seq_length or preset.seq_length
    if heads % args.tp:
        raise ConfigError(
            f"--tp ({args.tp}) must divide the {heads} attention heads of {preset.name}; use "
            f"--tp {_largest(args, preset, 'tp', largest_divisor(heads, args.tp))}"
        )
    if args.pp > layers:
        raise ConfigError(
            f"--pp ({args.pp}) must be at most the {layers} layers of {preset.name}; use "
            f"--pp {_largest(args, preset, 'pp', layers)}"
        )
    if not _cuts(args, length):
        raise ConfigError(
            f"--cp ({args.cp}) must cut the {length} tokens of a sequence into 2*cp*tp equal "
            f"parts; use --cp {_largest(args, preset, 'cp', 1)}"
        )
    product = args.tp * args.cp * args.pp
    if args.gpus % product:
        raise ConfigError(
            f"--tp {args.tp}, --cp {args.cp} and --pp {args.pp} take {product} GPUs or a multiple "
            f"of that; got --gpus {args.gpus}; use --gpus {_gpus(args, preset)}"
        )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _cuts(args: argparse.Namespace, length: int) -> bool:
    """Whether context parallelism cuts a sequence of `length` tokens evenly."""
    return bool(args.cp == 1 or length % (2 * args.cp * args.tp) == 0)


def _largest(args: argparse.Namespace, preset: Preset, name: str, otherwise: int) -> int:
    """Return the largest value up to that given which makes the whole line go, if there is one."""
    given = vars(args)
    most = {"tp": preset.model.heads, "pp": len(preset.model.experts)}.get(name, args.gpus)
    values = range(min(given[name], most), 0, -1)
    whole = (n for n in values if _whole(argparse.Namespace(**{**given, name: n}), preset))
    return next(whole, otherwise)


def _whole(args: argparse.Namespace, preset: Preset) -> bool:
    """Whether a layout of positive sizes goes with the model and the GPUs."""
    return bool(
        preset.model.heads % args.tp == 0
        and args.pp <= len(preset.model.experts)
        and _cuts(args, args.seq_length or preset.seq_length)
        and args.gpus % (args.tp * args.cp * args.pp) == 0
        and all(_goes(args, preset, ep) for ep in args.ep or [])
    )


def _gpus(args: argparse.Namespace, preset: Preset) -> int:
    """Return the smallest number of GPUs, from those given on, that the layout divides."""
    ranks = [ep for ep in args.ep or [1] if _shared(preset, ep)] or [1]
    step: int = args.pp * lcm(args.tp * args.cp, *(ep * args.etp for ep in ranks))
    return -(-max(int(args.gpus), 1) // step) * step


def _powers(preset: Preset) -> list[int]:
    """Return the powers of 2 up to the largest number of experts."""
    return [2**n for n in range(max(1, *preset.model.experts).bit_length())]


def _shared(preset: Preset, ep: int) -> bool:
    """Whether `ep` ranks can share the experts of the largest layer evenly."""
    return ep >= 1 and max(preset.model.experts) % ep == 0


def _goes(args: argparse.Namespace, preset: Preset, ep: int) -> bool:
    """Whether `ep` ranks share the experts, and a stage's GPUs, evenly."""
    return _shared(preset, ep) and args.gpus // args.pp % (ep * args.etp) == 0


def _check_experts(args: argparse.Namespace, preset: Preset, ep: int) -> None:
    """Raise ConfigError, with an --ep that goes, unless `ep` does."""
    if ep < 1:
        raise ConfigError(f"--ep must be positive; got {ep}; use --ep 1")
    if _goes(args, preset, ep):
        return
    per_stage = args.gpus // args.pp
    legal = next(
        (n for n in range(min(ep, max(1, *preset.model.experts)), 0, -1) if _goes(args, preset, n)),
        None,
    )
    use = f"--ep {legal}"
    if legal is None:
        use = f"--ep 1 --etp {largest_divisor(per_stage, args.etp)}"
    if not _shared(preset, ep):
        raise ConfigError(
            f"--ep ({ep}) must divide the {max(preset.model.experts)} experts of the largest layer "
            f"of {preset.name}; use {use}"
        )
    raise ConfigError(
        f"--ep {ep} times --etp {args.etp} must divide the {per_stage} GPUs of a pipeline stage; "
        f"use {use}"
    )


def _fit(args: argparse.Namespace, preset: Preset, ep: int, teacher: Teacher | None) -> Fit:
    _check_experts(args, preset, ep)
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
        dedup=_deduplicates(args, preset, ep),
    )
    fullest = max(stages, key=lambda stage: stage.total)
    beside = taught(teacher, preset, parallel, args) if teacher is not None else None
    total = (fullest.total + (beside.total if beside is not None else 0)) / 1e9
    return Fit(ep, parallel.edp, fullest, total, total <= USABLE * args.gpu_gb, beside)


def _deduplicates(args: argparse.Namespace, preset: Preset, ep: int) -> bool:
    if args.dispatch_dedup is not None:
        return bool(args.dispatch_dedup == "on")
    return saves_rows(preset.routing.topk, ep * args.etp)
