"""What a conversion prints: names and sizes before, the comparison and what to do next after."""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ep_plugin.checkpoint import manifest
from ep_plugin.checkpoint.moe_layers import pattern
from ep_plugin.checkpoint.staging import Staging
from ep_plugin.checkpoint.target import Hashes, Target
from ep_plugin.commands.convert.request import Request

BYTES_PER_SECOND = 200e6  # of output by one process on one core: read, copied, hashed, written


def check_manifest(folder: Path) -> int:
    """Print what is wrong with a converted checkpoint's files; returns the exit code."""
    problems = manifest.check(folder)
    for problem in problems:
        print(f"ep-plugin convert: {problem}", file=sys.stderr)
    if not problems:
        print(f"{folder}: every file has the bytes that were written")
    return 1 if problems else 0


def say_plan(request: Request, target: Target) -> int:
    """Print every name and size, and about how long writing takes; returns exit code 0."""
    seconds = target.num_bytes / BYTES_PER_SECOND / request.processes
    if request.json:
        sizes = {
            t.name: {"shape": t.info.shape, "num_bytes": t.info.num_bytes} for t in target.tensors
        }
        found = {"names": target.name_map, "tensors": sizes, "num_bytes": target.num_bytes}
        found["seconds"] = seconds
        if request.moments_go_along:
            found["deviations"] = list(target.model.deviations)
        print(json.dumps(found))
        return 0
    for old, name in target.name_map:
        print(f"{old or '(new)'} -> {name}")
    for name in target.model.left_out:
        print(f"{name} -> (left out)")
    for tensor in target.tensors:
        print(f"{tensor.info.num_bytes:>14} bytes  {tensor.name} {list(tensor.info.shape)}")
    for reason in target.model.deviations:
        print(f"the output is not kept: {reason}")
    print(f"{target.num_bytes:>14} bytes in all; nothing written")
    print(f"{seconds:>14.1f} s expected, at {BYTES_PER_SECOND / 1e6:.0f} MB/s a process")
    return 0


def write(target: Target, staging: Staging, processes: int) -> Hashes:
    """Write what is not there yet, with a bar for progress; returns hashes as `target.write`."""
    with tqdm(
        total=target.num_bytes, unit="B", unit_scale=True, unit_divisor=1024, desc="convert"
    ) as bar:
        return target.write(staging, processes, bar.update)


def comparison_table(report: dict[str, Any], deviations: list[str]) -> str:
    """Return the report of a comparison for a reader."""
    tokens = f"{report['tokens']} random tokens"
    if report["prompts"] is not None:
        tokens = f"{report['tokens']} tokens of {report['prompts']} prompts"
    lines = [f"source and result in {report['dtype']}, {tokens}:"]
    lines.append("  output of         max |difference|     max |source|")
    rows = [
        (f"layer {row['layer']}", row["max_abs_diff"], row["max_abs"]) for row in report["layers"]
    ]
    rows.append(("logits", report["logits_max_abs_diff"], report["logits_max_abs"]))
    lines += [f"  {name:<18}{difference:>16.3e}{size:>17.3e}" for name, difference, size in rows]
    return "\n".join([*lines, *(f"  the output is not kept: {reason}" for reason in deviations)])


def say_summary(request: Request, target: Target, report: dict[str, Any] | None) -> int:
    """Print what was made and how to go on; returns exit code 0."""
    made = _experts(request, target) if request.moments_go_along else _model(request, target)
    made |= {"parity": report, "megatron_flags": _flags(request, target)}
    if request.json:
        print(json.dumps(made))
    else:
        _print(request, target, report)
    return 0


def _experts(request: Request, target: Target) -> dict[str, Any]:
    settings, made = request.settings, target.model.upcycled
    assert settings is not None
    assert made is not None
    return {
        "checkpoint": str(request.target),
        "iteration_folder": target.iteration,
        "mode": settings.mode,
        "granularity": settings.granularity,
        "router_init": settings.router_init,
        "shared_expert": settings.shared_expert,
        "num_experts": settings.num_experts,
        "topk": settings.topk,
        "moe_layers": _moe_layers(target),
        "num_layers": target.model.args.num_layers,
        "num_bytes": target.num_bytes,
        "ep": settings.ep,
        "optimizer": made.optimizer,
        "dropped_entries": made.dropped,
        "seed": settings.seed,
        "deviations": list(target.model.deviations),
    }


def _model(request: Request, target: Target) -> dict[str, Any]:
    return {
        "checkpoint": str(request.target),
        "format": request.format,
        "family": _family(target),
        "left_out": target.model.left_out,
        "deviations": target.model.deviations,
        "num_tensors": len(target.tensors),
        "num_bytes": target.num_bytes,
    }


def _moe_layers(target: Target) -> list[int]:
    return [layer for layer, is_moe in enumerate(pattern(target.model.args)) if is_moe]


def _family(target: Target) -> str | None:
    return target.model.family.model_type if target.model.family else None


def _flags(request: Request, target: Target) -> list[str]:
    """Return the flags of summaries: where names stay, with those that load the checkpoint."""
    if not request.moments_go_along:
        return target.flags
    return [*_load(request, target), *target.flags]


def _load(request: Request, target: Target) -> list[str]:
    made = target.model.upcycled
    resumes = made is not None and made.optimizer
    return ["--load", str(request.target), *([] if resumes else ["--finetune"])]


def _print(request: Request, target: Target, report: dict[str, Any] | None) -> None:
    kind = ", ".join(filter(None, (request.format, _family(target))))
    size = f"{len(target.tensors)} tensors, {target.num_bytes / 2**20:.1f} MiB"
    print(f"wrote {request.target} ({kind}): {size}")
    settings, made = request.settings, target.model.upcycled
    if settings is not None:
        print(
            f"mode {settings.mode}, {settings.num_experts} experts, top-{settings.topk}, in "
            f"{len(_moe_layers(target))} of {target.model.args.num_layers} layers"
        )
    if target.model.left_out:
        print(f"left out: {', '.join(target.model.left_out)}")
    for reason in target.model.deviations:
        print(f"the output is not kept: {reason}")
    if report is None:
        print("source and result: not compared")
    if made is not None and request.moments_go_along:
        print(_optimizer(made.optimizer, made.dropped))
    if request.format == "megatron":
        _print_next(request, target)


def _optimizer(resumes: bool, dropped: int) -> str:
    if resumes:
        return (
            f"left out: random-number and rerun state ({dropped} entries); the optimizer goes on: "
            "moments copied to each expert, zero for routers"
        )
    return (
        f"left out: optimizer, random-number and rerun state ({dropped} entries); the optimizer "
        "starts afresh"
    )


def _print_next(request: Request, target: Target) -> None:
    settings, made = request.settings, target.model.upcycled
    flags = shlex.join([*_load(request, target), *target.flags])
    if settings is None or made is None or not request.moments_go_along:
        print("continue with your flags for data and optimizer, and:")
        print(f"  {flags}")
        return
    print("continue with the dense run's flags and:")
    print(f"  {flags} --expert-model-parallel-size {settings.ep or 'EP'}")
    if made.optimizer:
        divisors = f"any divisor above 1 of {settings.num_experts}"
        print(f"  EP: {'1' if settings.ep == 1 else divisors}; --no-load-optim at another. With")
        print("  another length of training or learning rate than the dense run's,")
        print("  --override-opt-param-scheduler")
        return
    print("  or, to keep the iteration and the place in the data, --no-load-optim --no-load-rng")
    print("  instead of --finetune")
    print(f"  EP: any divisor of {settings.num_experts}.")
