"""What a conversion prints: names and sizes before, the comparison and what to do next after."""

import json
import shlex
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ep_plugin.checkpoint.moe_layers import pattern
from ep_plugin.checkpoint.staging import manifest_problems
from ep_plugin.checkpoint.target import Target
from ep_plugin.commands.convert.beside import tokenizer
from ep_plugin.commands.convert.compare import need
from ep_plugin.commands.convert.flags_txt import why_not
from ep_plugin.commands.convert.request import Request
from ep_plugin.megatron.arguments.run_flags import experts_flags, padded_vocabulary, run_flags

BYTES_PER_SECOND = 200e6  # of output by one process on one core: read, copied, hashed, written


def check_manifest(folder: Path) -> int:
    """Print what is wrong with a converted checkpoint's files; returns the exit code."""
    problems = manifest_problems(folder)
    for problem in problems:
        print(f"ep-plugin convert: {problem}", file=sys.stderr)
    if not problems:
        print(f"{folder}: every file has the bytes that were written")
    return 1 if problems else 0


def say_plan(request: Request, target: Target) -> int:
    """Print every name and size, and about how long writing takes; returns exit code 0."""
    seconds = target.num_bytes / BYTES_PER_SECOND / request.processes
    comparison = need(request, target)
    if request.json:
        sizes = {
            t.name: {"shape": t.info.shape, "num_bytes": t.info.num_bytes} for t in target.tensors
        }
        found = {
            "names": target.name_map,
            "tensors": sizes,
            "num_bytes": target.num_bytes,
            "seconds": seconds,
            "deviations": list(target.model.deviations),
            "settings": request.asked,
            "comparison": None if comparison is None else asdict(comparison),
        }
        print(json.dumps(found))
        return 0
    for name, value in request.asked.items():
        print(f"{name.removeprefix('--')}: {value}")
    for old, name in target.name_map:
        print(f"{old or '(new)'} -> {name}")
    for name in target.model.left_out:
        print(f"{name} -> (left out)")
    for tensor in target.tensors:
        print(f"{tensor.info.num_bytes:>14} bytes  {tensor.name} {list(tensor.info.shape)}")
    for reason in target.model.deviations:
        print(f"the model's output changes: {reason}")
    for line in _vocabulary(request, target):
        print(line)
    print(f"{target.num_bytes:>14} bytes in all; nothing written")
    print(f"{seconds:>14.1f} s expected, at {BYTES_PER_SECOND / 1e6:.0f} MB/s a process")
    print("source and result are not compared" if comparison is None else comparison.sentence())
    return 0


def say_summary(request: Request, target: Target, report: dict[str, Any] | None) -> int:
    """Print what was made and how to go on; returns exit code 0."""
    if request.json:
        print(json.dumps(_summary(request, target, report)))
    else:
        _print(request, target, report)
    return 0


def _summary(request: Request, target: Target, report: dict[str, Any] | None) -> dict[str, Any]:
    """Return what was made, as one JSON object; None where a setting has no meaning."""
    num_experts = getattr(target.model.args, "num_experts", None)
    model, settings, made = target.model, request.settings, target.model.upcycled
    return {
        "checkpoint": str(request.target),
        "format": request.format,
        "iteration_folder": target.iteration,
        "family": _family(target),
        "left_out": list(model.left_out),
        "mode": settings.mode if settings else None,
        "granularity": settings.granularity if settings else None,
        "router_init": settings.router_init if settings else None,
        "shared_expert": settings.shared_expert if settings else None,
        "num_experts": num_experts,
        "topk": getattr(model.args, "moe_router_topk", None) if num_experts else None,
        "moe_layers": _moe_layers(target),
        "num_layers": model.args.num_layers,
        "num_tensors": len(target.tensors),
        "num_bytes": target.num_bytes,
        "ep": settings.ep if settings else None,
        "optimizer": _resumes(target),
        "dropped_entries": made.dropped if made else 0,
        "seed": request.seed,
        "deviations": list(model.deviations),
        "vocab_size": getattr(model.args, "ep_vocab_size", None),
        "cut_rows": model.cut_rows,
        "training": _training(request, target),
        "tokenizer": tokenizer(request, target),
        "parity": report,
        "megatron_flags": _flags(request, target),
    }


def _moe_layers(target: Target) -> list[int]:
    return [layer for layer, is_moe in enumerate(pattern(target.model.args)) if is_moe]


def _family(target: Target) -> str | None:
    return target.model.family.model_type if target.model.family else None


def _training(request: Request, target: Target) -> list[str]:
    """Return what training with the settings of source and result differs in."""
    family, exported = target.model.family, request.format == "hf"
    return family.training_notes(target.args, exported) if family else []


def _flags(request: Request, target: Target) -> list[str]:
    """Return the flags of summaries: where names stay, with those that load the checkpoint."""
    flags = _model_flags(request, target)
    return [*_load(request, target), *flags] if request.moments_go_along else flags


def _model_flags(request: Request, target: Target) -> list[str]:
    """Return the flags of the model; where names stay, those beside a dense run's own."""
    model = target.model
    names_stay = model.upcycled is not None and model.spelling == "stored"
    beside = names_stay and request.format != "hf"
    return experts_flags(target.args) if beside else run_flags(target.args)


def _load(request: Request, target: Target) -> list[str]:
    return ["--load", str(request.target), *([] if _resumes(target) else ["--finetune"])]


def _resumes(target: Target) -> bool:
    """Whether the optimizer goes on."""
    return target.model.upcycled is not None and target.model.upcycled.optimizer


def _print(request: Request, target: Target, report: dict[str, Any] | None) -> None:
    kind = ", ".join(filter(None, (request.format, _family(target))))
    size = f"{len(target.tensors)} tensors, {target.num_bytes / 2**20:.1f} MiB"
    print(f"wrote {request.target} ({kind}): {size}")
    settings, made = request.settings, target.model.upcycled
    if settings is not None and made is not None:
        print(
            f"mode {settings.mode}, {settings.num_experts} experts, top-{settings.topk}, in "
            f"{sum(made.moe_layers)} of {target.model.args.num_layers} layers"
        )
    if target.model.left_out:
        print(f"left out: {', '.join(target.model.left_out)}")
    for reason in target.model.deviations:
        print(f"the model's output changes: {reason}")
    for line in _vocabulary(request, target):
        print(line)
    if (beside := tokenizer(request, target)) is not None:
        print(beside)
    for difference in _training(request, target):
        print(f"in training: {difference}")
    if report is None:
        print("source and result were not compared (--skip-parity)")
    if made is not None and request.moments_go_along:
        print(_optimizer(made.optimizer, made.dropped))
    if request.format == "megatron":
        _print_next(request, target)
        _print_recipe(request, target)


def _vocabulary(request: Request, target: Target) -> Iterator[str]:
    """Yield what is to be said of rows that pad the vocabulary."""
    model = target.model
    rows = getattr(model.args, "padded_vocab_size", None)
    size = getattr(model.args, "ep_vocab_size", None)
    if rows is None:
        return
    if model.cut_rows:
        yield f"vocabulary: {rows} rows; {model.cut_rows} that only padded it are cut"
    elif request.vocab_size is not None:
        yield f"vocabulary: {size} of {rows} rows; the others pad it, and an export cuts them"
    elif size is None and model.spelling == "plain":
        yield (
            f"vocabulary: all {rows} rows are kept, since the checkpoint does not say whether some "
            "only pad it; --vocab-size V keeps V"
        )
    if request.format != "megatron" or model.spelling == "stored":
        return
    padded = padded_vocabulary(target.args)
    if padded != rows:
        yield (
            f"vocabulary: {rows} rows, and {padded} in a run, so that each tensor-parallel size "
            "that the heads allow divides it; Megatron fills the new rows with zeros"
        )


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


def _print_recipe(request: Request, target: Target) -> None:
    if reason := why_not(request, target):
        print(f"no flags.txt, so recipes/run.sh cannot run it: {reason}")
        return
    folder = str(request.target)
    words = shlex.join([f"MODEL={folder if '/' in folder else f'./{folder}'}"])
    print("or fine-tune its weights with a recipe, on 2 ranks:")
    print(f"  {words} LAYOUT=ep2 ./recipes/run.sh pretrain_gpt.py")


def _print_next(request: Request, target: Target) -> None:
    settings, made = request.settings, target.model.upcycled
    flags = shlex.join([*_load(request, target), *_model_flags(request, target)])
    if settings is None or made is None or not request.moments_go_along:
        print("continue with your flags for data and optimizer, and:")
        print(f"  {flags}")
        return
    print("continue with the dense run's flags and:")
    print(f"  {flags} --expert-model-parallel-size {settings.ep or 'EP'}")
    if made.optimizer:
        divisors = f"any divisor above 1 of {settings.num_experts}"
        print(f"  EP: {'1' if settings.ep == 1 else divisors}; at another add --no-load-optim")
        print("  for another training length or learning rate than the dense run's, add")
        print("  --override-opt-param-scheduler")
        return
    print("  or, to keep the iteration and the place in the data, --no-load-optim --no-load-rng")
    print("  instead of --finetune")
    print(f"  EP: any divisor of {settings.num_experts}")
