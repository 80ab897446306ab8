"""`ep-plugin convert` between formats: Hugging Face's, and Megatron's new and old."""

import argparse
import json
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ep_plugin.checkpoint.adapt.upcycle import Upcycling
from ep_plugin.checkpoint.conversion import (
    Result,
    is_hf,
    is_stored,
    open_source,
    to_hf_folder,
    to_megatron_checkpoint,
    with_experts,
)
from ep_plugin.checkpoint.formats.megatron_dist import iteration_folder
from ep_plugin.checkpoint.prompts import Prompts
from ep_plugin.checkpoint.staging import check_free, check_room, source_request, staged
from ep_plugin.commands.convert.say import time_expected, time_line, tokens_of
from ep_plugin.errors import BackendUnavailable, ConfigError

REPORT = "parity.json"
EXAMPLES = r"""
between formats:
  ep-plugin convert --from models/qwen3 --to runs/qwen3
  ep-plugin convert --from runs/moe --to models/moe --format hf --verify
  ep-plugin convert --from models/llama --to models/mixtral --format hf --num-experts 8 --topk 2
"""


class _Differs(Exception):
    """The result does not compute what the source computes."""


def wanted(args: argparse.Namespace) -> bool:
    """Whether this is more than a torch_dist checkpoint that gets experts."""
    return not is_stored(args.source) or args.format == "hf" or args.num_experts is None


def run(
    args: argparse.Namespace, settings: Upcycling | None, prompts: Prompts | None = None
) -> int:
    """Convert; `settings` when it gets experts. Returns 0, or 1 when --verify found a difference.

    Raises ConfigError for a user's mistake.
    """
    if prompts is not None and not args.verify:
        raise ConfigError("--prompts are what --verify compares on; use --verify, too")
    check_free(args.target)
    result = _plan(args, settings)
    if args.dry_run:
        _print_dry_run(result, args.processes, args.json)
        return 0
    check_room(args.target, result.num_bytes)
    compare = _load_compare(args) if args.verify else None
    report = None
    try:
        with staged(args.target, _request(args, settings)) as staging:
            with tqdm(
                total=result.num_bytes, unit="B", unit_scale=True, unit_divisor=1024, desc="convert"
            ) as bar:
                written = result.write(staging, args.processes, bar.update)
            if compare is not None:
                report = _check(compare, written, staging.folder, args, result, prompts)
    except _Differs as error:
        print(f"ep-plugin convert: {error}", file=sys.stderr)
        return 1
    _print_summary(result, args, report)
    return 0


def _request(args: argparse.Namespace, settings: Upcycling | None) -> dict[str, Any]:
    """Return all that the bytes of the result depend on."""
    return {
        **source_request(args.source),
        "--format": args.format,
        "--family": args.family,
        "--transformer-impl": args.transformer_impl,
        **(asdict(settings) if settings else {}),
    }


def _plan(args: argparse.Namespace, settings: Upcycling | None) -> Result:
    dense = open_source(args.source)
    opened = dense
    if settings is not None:
        opened = with_experts(dense, settings)
    elif args.format == "megatron" and is_stored(args.source):
        raise ConfigError(
            f"{args.source} is a torch_dist checkpoint already; use --format hf, or --num-experts "
            "and --topk"
        )
    if args.format == "hf":
        return to_hf_folder(opened, dense, args.family, args.source)
    return to_megatron_checkpoint(opened, args.transformer_impl)


def _load_compare(args: argparse.Namespace) -> Callable[..., dict[str, Any]]:
    if not (is_hf(args.source) or args.format == "hf"):
        raise ConfigError(
            "--verify compares with transformers, and neither side is a Hugging Face model; "
            "leave it out"
        )
    if not (is_hf(args.source) or is_stored(args.source)):
        raise ConfigError(
            f"--verify cannot run {args.source}, which is in per-rank files; convert it without "
            "--format hf first, and verify from there"
        )
    try:
        with aside():
            compare: Callable[..., dict[str, Any]] = import_module(
                "ep_plugin.commands.convert.compare"
            ).compare
            import_module("ep_plugin.megatron.workers.model_run")
    except ImportError as error:
        raise BackendUnavailable(
            f"--verify needs transformers and megatron-core with megatron.training ({error}); "
            "install 'ep-plugin[hf,megatron]', or leave it out"
        ) from error
    return compare


@contextmanager
def aside() -> Iterator[None]:
    """Keep what loading prints off stdout; drop warnings about packages not needed here."""
    with redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _check(
    compare: Callable[..., dict[str, Any]],
    written: Path,
    root: Path,
    args: argparse.Namespace,
    result: Result,
    prompts: Prompts | None,
) -> dict[str, Any]:
    """Compare source and result, keep the report in `root`.

    Raises _Differs where the result is to keep the function.
    """
    source = args.source if is_hf(args.source) else iteration_folder(args.source)
    with aside():
        report = compare(source, written, seed=args.seed, prompts=prompts)
    report["tolerance"] = args.parity_tolerance
    report["passed"] = report["logits_max_abs_diff"] <= args.parity_tolerance  # False for nan
    (root / REPORT).write_text(json.dumps(report, indent=2) + "\n")
    print(_table(report), file=sys.stderr if args.json else sys.stdout)
    if not report["passed"] and not result.deviations:
        raise _Differs(
            f"logits differ by {report['logits_max_abs_diff']:.3e}, more than --parity-tolerance "
            f"{args.parity_tolerance:.1e}; {args.target} was not written"
        )
    return report


def _table(report: dict[str, Any]) -> str:
    lines = [f"source and result in {report['dtype']}, {tokens_of(report)}:"]
    lines.append("  output of         max |difference|     max |source|")
    rows = [
        (f"layer {row['layer']}", row["max_abs_diff"], row["max_abs"]) for row in report["layers"]
    ]
    rows.append(("logits", report["logits_max_abs_diff"], report["logits_max_abs"]))
    lines += [f"  {name:<18}{difference:>16.3e}{size:>17.3e}" for name, difference, size in rows]
    return "\n".join(lines)


def _print_summary(result: Result, args: argparse.Namespace, report: dict[str, Any] | None) -> None:
    summary = {
        "checkpoint": str(args.target),
        "format": args.format,
        "family": result.family,
        "left_out": result.left_out,
        "deviations": result.deviations,
        "num_tensors": len(result.tensors),
        "num_bytes": result.num_bytes,
        "parity": report,
        "megatron_flags": result.flags,
    }
    if args.json:
        print(json.dumps(summary))
        return
    kind = f"{args.format}, {summary['family']}" if summary["family"] else args.format
    size = result.num_bytes / 2**20
    print(f"wrote {args.target} ({kind}): {summary['num_tensors']} tensors, {size:.1f} MiB")
    if summary["left_out"]:
        print(f"left out: {', '.join(summary['left_out'])}")
    for reason in result.deviations:
        print(f"the output is not kept: {reason}")
    if report is None:
        print("logits: not compared (--verify would)")
    if args.format == "megatron":
        print("continue with your flags for data and optimizer, and:")
        print(f"  {shlex.join(['--load', str(args.target), '--finetune', *result.flags])}")


def _print_dry_run(result: Result, processes: int, as_json: bool) -> None:
    tensors = result.tensors
    seconds = time_expected(result.num_bytes, processes)
    if as_json:
        sizes = {t.name: {"shape": t.info.shape, "num_bytes": t.info.num_bytes} for t in tensors}
        found = {"names": result.name_map, "tensors": sizes, "num_bytes": result.num_bytes}
        print(json.dumps(found | {"seconds": seconds}))
        return
    for old, name in result.name_map:
        print(f"{old} -> {name}")
    for name in result.left_out:
        print(f"{name} -> (left out)")
    for tensor in tensors:
        print(f"{tensor.info.num_bytes:>14} bytes  {tensor.name} {list(tensor.info.shape)}")
    print(f"{result.num_bytes:>14} bytes in all; nothing written")
    print(time_line(seconds))
