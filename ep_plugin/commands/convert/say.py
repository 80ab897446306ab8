"""What a conversion prints: names and sizes before, parity and what to do next after."""

import argparse
import json
import shlex
from typing import Any

from ep_plugin.checkpoint.adapt.settings import Upcycling
from ep_plugin.checkpoint.adapt.upcycle import Plan
from ep_plugin.checkpoint.tensors import NewTensor

BYTES_PER_SECOND = 200e6  # of output by one process on one core: read, copied, hashed, written


def tokens_of(report: dict[str, Any]) -> str:
    """Return what two models were compared on."""
    if report["prompts"] is None:
        return f"{report['tokens']} random tokens"
    return f"{report['tokens']} tokens of {report['prompts']} prompts"


def time_expected(num_bytes: int, processes: int) -> float:
    """Return about how many seconds writing takes."""
    return num_bytes / BYTES_PER_SECOND / processes


def time_line(seconds: float) -> str:
    """Return that for a reader."""
    return f"{seconds:>14.1f} s expected, at {BYTES_PER_SECOND / 1e6:.0f} MB/s a process"


def parity_table(report: dict[str, Any]) -> str:
    """Return the table of `ep_plugin.megatron.workers.model_run.compare`'s report."""
    lines = [f"parity, dense and MoE in {report['dtype']}, {tokens_of(report)}:"]
    lines += ["  output of         max |dense - MoE|   max |dense|"]
    for row in report["layers"]:
        name = f"layer {row['layer']} ({'MoE' if row['moe'] else 'dense'})"
        lines.append(f"  {name:<18}{row['max_abs_diff']:>17.3e}{row['max_abs']:>14.3e}")
    lines.append(
        f"  {'logits':<18}{report['logits_max_abs_diff']:>17.3e}{report['logits_max_abs']:>14.3e}"
    )
    lines += [f"  not the same function: {reason}" for reason in report["deviations"]]
    return "\n".join(lines)


def summary(
    new: Plan,
    settings: Upcycling,
    args: argparse.Namespace,
    iteration_folder: str,
    parity: dict[str, Any] | None,
) -> dict[str, Any]:
    """Return what was made, as one JSON object."""
    return {
        "checkpoint": str(args.target),
        "iteration_folder": iteration_folder,
        "mode": settings.mode,
        "granularity": settings.granularity,
        "router_init": settings.router_init,
        "shared_expert": settings.shared_expert,
        "num_experts": settings.num_experts,
        "topk": settings.topk,
        "moe_layers": [layer for layer, is_moe in enumerate(new.moe_layers) if is_moe],
        "num_layers": len(new.moe_layers),
        "num_bytes": new.num_bytes,
        "ep": settings.ep,
        "optimizer": new.optimizer,
        "dropped_entries": new.dropped,
        "seed": settings.seed,
        "deviations": list(new.deviations),
        "parity": parity,
        "megatron_flags": _megatron_flags(new, settings, args),
    }


def _megatron_flags(new: Plan, settings: Upcycling, args: argparse.Namespace) -> list[str]:
    run_args, gates = new.common["args"], settings.gates
    flags = [
        *("--load", str(args.target), *([] if new.optimizer else ["--finetune"])),
        *("--num-experts", str(settings.num_experts)),
        *("--moe-router-topk", str(settings.topk)),
        *("--moe-ffn-hidden-size", str(run_args.moe_ffn_hidden_size)),
    ]
    if run_args.moe_layer_freq != 1:
        flags += ["--moe-layer-freq", str(run_args.moe_layer_freq).replace(" ", "")]
    if gates.score_function != "softmax":
        flags += ["--moe-router-score-function", gates.score_function]
    if gates.pre_softmax:
        flags += ["--moe-router-pre-softmax"]
    if gates.scaling_factor != 1:
        flags += ["--moe-router-topk-scaling-factor", str(gates.scaling_factor)]
    if gates.num_groups is not None:
        flags += ["--moe-router-num-groups", str(gates.num_groups)]
        flags += ["--moe-router-group-topk", str(gates.group_topk)]
    if gates.expert_bias:
        flags += ["--moe-router-enable-expert-bias"]
    if settings.shared_expert != "none":
        flags += ["--moe-shared-expert-intermediate-size", str(run_args.ffn_hidden_size)]
    if settings.shared_expert == "learned":
        flags += ["--ep-shared-expert", "learned"]
    return flags


def print_summary(made: dict[str, Any], as_json: bool) -> None:
    """Print `summary` for a reader, or as JSON."""
    if as_json:
        print(json.dumps(made))
        return
    print(
        f"wrote {made['checkpoint']}: mode {made['mode']}, {made['num_experts']} experts, "
        f"top-{made['topk']}, in {len(made['moe_layers'])} of {made['num_layers']} layers, "
        f"{made['num_bytes'] / 2**20:.1f} MiB"
    )
    if made["parity"] is None:
        print("parity: not checked (--skip-parity)")
        for reason in made["deviations"]:
            print(f"  not the same function: {reason}")
    if made["optimizer"]:
        print(
            f"left out: random-number and rerun state ({made['dropped_entries']} entries); the "
            "optimizer goes on: moments copied to each expert, zero for routers"
        )
    else:
        print(
            "left out: optimizer, random-number and rerun state "
            f"({made['dropped_entries']} entries); the optimizer starts afresh"
        )
    ep = made["ep"] or "EP"
    print("continue with the dense run's flags and:")
    print(f"  {shlex.join(made['megatron_flags'])} --expert-model-parallel-size {ep}")
    if made["optimizer"]:
        legal = "1" if made["ep"] == 1 else f"any divisor above 1 of {made['num_experts']}"
        print(f"  EP: {legal}; --no-load-optim at another. With another length of training or")
        print("  learning rate than the dense run's, --override-opt-param-scheduler")
        return
    print("  or, to keep the iteration and the place in the data, --no-load-optim --no-load-rng")
    print("  instead of --finetune")
    print(f"  EP: any divisor of {made['num_experts']}.")


def print_dry_run(new: Plan, processes: int, as_json: bool) -> None:
    """Print every name and size, and about how long writing takes."""
    tensors = [entry for entry in new.content if isinstance(entry, NewTensor)]
    seconds = time_expected(new.num_bytes, processes)
    if as_json:
        sizes = {t.name: {"shape": t.info.shape, "num_bytes": t.info.num_bytes} for t in tensors}
        found = {
            "names": new.name_map,
            "tensors": sizes,
            "num_bytes": new.num_bytes,
            "seconds": seconds,
            "deviations": list(new.deviations),
        }
        print(json.dumps(found))
        return
    for old, name in new.name_map:
        print(f"{old or '(new)'} -> {name}")
    for tensor in tensors:
        print(f"{tensor.info.num_bytes:>14} bytes  {tensor.name} {list(tensor.info.shape)}")
    for reason in new.deviations:
        print(f"not the same function: {reason}")
    print(f"{new.num_bytes:>14} bytes in all; {new.dropped} entries left out; nothing written")
    print(f"{time_line(seconds)}, and parity")
