"""The same as `say.py` for programs: a plan or a result as one JSON object."""

import json
from dataclasses import asdict
from typing import Any

from ep_plugin.checkpoint.moe_layers import pattern
from ep_plugin.checkpoint.target import Target
from ep_plugin.commands.convert.compare import need
from ep_plugin.commands.convert.request import Request
from ep_plugin.commands.convert.say import (
    family_of,
    load_flags,
    printed_flags,
    resumes,
    seconds_of,
    tokenizer,
    training_notes,
)


def print_plan(request: Request, target: Target) -> int:
    """Print every name and size, and about how long writing takes; returns exit code 0."""
    comparison = need(request, target)
    sizes = {t.name: {"shape": t.info.shape, "num_bytes": t.info.num_bytes} for t in target.tensors}
    found = {
        "names": target.name_map,
        "tensors": sizes,
        "num_bytes": target.num_bytes,
        "seconds": seconds_of(request, target),
        "deviations": list(target.model.deviations),
        "settings": request.asked,
        "comparison": None if comparison is None else asdict(comparison),
    }
    print(json.dumps(found))
    return 0


def print_summary(request: Request, target: Target, report: dict[str, Any] | None) -> int:
    """Print what was made; returns exit code 0."""
    print(json.dumps(_summary(request, target, report)))
    return 0


def _summary(request: Request, target: Target, report: dict[str, Any] | None) -> dict[str, Any]:
    """Return what was made, as one JSON object; None where a setting has no meaning."""
    num_experts = getattr(target.model.args, "num_experts", None)
    model, settings = target.model, request.settings
    kept = model.kept
    made = model.upcycled or kept or model.reclassed
    return {
        "checkpoint": str(request.target),
        "format": request.format,
        "iteration_folder": target.iteration,
        "family": family_of(target),
        "left_out": list(model.left_out),
        "emptied": list(model.emptied),
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
        "optimizer": resumes(target),
        "dropped_entries": made.dropped if made else 0,
        "kept_layers": list(kept.layers) if kept else None,
        "model_class": request.model_class,
        "hybrid_layer_pattern": getattr(target.args, "hybrid_layer_pattern", None),
        "seed": request.seed,
        "deviations": list(model.deviations),
        "vocab_size": getattr(model.args, "ep_vocab_size", None),
        "cut_rows": model.cut_rows,
        "training": training_notes(request, target),
        "tokenizer": tokenizer(request, target),
        "parity": report,
        "megatron_flags": _flags(request, target),
    }


def _moe_layers(target: Target) -> list[int]:
    return [layer for layer, is_moe in enumerate(pattern(target.model.args)) if is_moe]


def _flags(request: Request, target: Target) -> list[str]:
    """Return the flags of summaries: where names stay, with those that load the checkpoint."""
    flags = printed_flags(request, target)
    return [*load_flags(request, target), *flags] if request.moments_go_along else flags
