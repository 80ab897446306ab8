"""`ep-plugin convert`: a dense checkpoint becomes a Mixture-of-Experts that computes the same."""

import argparse
import contextlib
import importlib
import json
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ep_plugin.config import BackendUnavailable, ConfigError
from ep_plugin.convert import translation
from ep_plugin.convert.formats.megatron_dist import open_checkpoint, write_checkpoint
from ep_plugin.convert.staging import check_free, staged
from ep_plugin.convert.stream import NewTensor
from ep_plugin.convert.upcycle import Plan, Upcycling, plan

PARITY_REPORT = "parity.json"
EXAMPLES = r"""examples:
  ep-plugin convert --from runs/dense --to runs/moe --num-experts 8 --topk 2
  ep-plugin convert --from runs/dense/iter_0001000 --to runs/moe --num-experts 64 --topk 4 \
      --layers every:2
  ep-plugin convert --from runs/dense --to runs/moe --num-experts 8 --topk 2 \
      --layers '[0]*1+[1]*3' --dry-run

The output is a Megatron torch_dist checkpoint that loads at any tensor-, pipeline- and
expert-parallel size. Model weights alone are carried over; continue with --finetune.
Exit code 1: parity failed; 2: a setting or the input is wrong. Neither leaves an output behind.
"""
EXAMPLES += translation.EXAMPLES


class ParityFailed(Exception):
    """The new model does not compute what the dense one computed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--from", dest="source", type=Path, required=True, metavar="SOURCE",
        help="what --save named, or one iter_NNNNNNN folder; or a Hugging Face model",
    )  # fmt: skip
    parser.add_argument(
        "--to", dest="target", type=Path, required=True, metavar="TARGET",
        help="folder to write; must be missing or empty",
    )  # fmt: skip
    parser.add_argument("--num-experts", type=int, metavar="E")
    parser.add_argument("--topk", type=int, metavar="K", help="experts per token")
    parser.add_argument(
        "--layers", default="all", metavar="WHICH",
        help="which layers become MoE: all, every:N, or a pattern such as [0,1,0,1] (default: all)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=1234, help="of router and parity tokens")
    parser.add_argument(
        "--parity-tolerance", type=float, default=1e-4, metavar="D",
        help="largest allowed difference of a logit in float32 (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--skip-parity", action="store_true", help="do not compare the models (needs no Megatron)"
    )
    translation.add_arguments(parser)
    parser.add_argument("--dry-run", action="store_true", help="print names and sizes only")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")


def run(args: argparse.Namespace) -> int:
    """Convert. Returns 0, or 1 when parity failed; raises ConfigError for a user's mistake."""
    settings = _settings(args)
    if not args.parity_tolerance > 0:
        raise ConfigError(f"--parity-tolerance must be above 0; got {args.parity_tolerance}")
    if settings is None or translation.wanted(args):
        return translation.run(args, settings)
    check_free(args.target)
    source = open_checkpoint(args.source)
    new = plan(source, settings)
    if args.dry_run:
        _print_dry_run(new, args.json)
        return 0
    compare = None if args.skip_parity else _load_parity()
    report = None
    try:
        with staged(args.target) as folder:
            with _progress(new) as on_bytes:
                write_checkpoint(folder, source, new.common, new.content, on_bytes)
            if compare is not None:
                moe = folder / source.folder.name
                report = _check_parity(compare, source.folder, moe, args)
    except ParityFailed as error:
        print(f"ep-plugin convert: {error}", file=sys.stderr)
        return 1
    _print_summary(_summary(new, settings, args, source.folder.name, report), args.json)
    return 0


def _settings(args: argparse.Namespace) -> Upcycling | None:
    """Return what to make of the dense model; None where only the format is to change."""
    if args.num_experts is None and args.topk is None:
        return None
    if args.num_experts is None or args.topk is None:
        raise ConfigError(
            f"--num-experts ({args.num_experts}) and --topk ({args.topk}) go together; "
            "--num-experts 8 --topk 2 would do"
        )
    return Upcycling(
        num_experts=args.num_experts, topk=args.topk, layers=args.layers, seed=args.seed
    )


def _load_parity() -> Callable[..., dict[str, Any]]:
    """Return `compare`; the one edge from here to Megatron, taken only when parity is wanted."""
    try:
        with _aside():
            module = importlib.import_module("ep_plugin.megatron.parity")
    except ImportError as error:
        raise BackendUnavailable(
            f"the parity check needs megatron-core with megatron.training ({error}); install "
            "'ep-plugin[megatron]', or use --skip-parity"
        ) from error
    compare: Callable[..., dict[str, Any]] = module.compare
    return compare


@contextlib.contextmanager
def _aside() -> Iterator[None]:
    """Keep what Megatron prints off stdout; drop its warnings about packages not needed here."""
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _progress(new: Plan) -> Iterator[Callable[[int], object]]:
    bar = tqdm(total=new.num_bytes, unit="B", unit_scale=True, unit_divisor=1024, desc="convert")
    with bar:
        yield bar.update


def _check_parity(
    compare: Callable[..., dict[str, Any]], dense: Path, moe: Path, args: argparse.Namespace
) -> dict[str, Any]:
    """Compare the models and keep the report beside `moe`. Raises ParityFailed."""
    with _aside():
        report = compare(dense, moe, seed=args.seed)
    report["tolerance"] = args.parity_tolerance
    report["passed"] = report["logits_max_abs_diff"] <= args.parity_tolerance  # False for nan
    (moe.parent / PARITY_REPORT).write_text(json.dumps(report, indent=2) + "\n")
    print(_parity_table(report), file=sys.stderr if args.json else sys.stdout)
    if not report["passed"]:
        raise ParityFailed(
            f"parity failed: logits differ by {report['logits_max_abs_diff']:.3e}, more than "
            f"--parity-tolerance {args.parity_tolerance:.1e}; {args.target} was not written"
        )
    return report


def _parity_table(report: dict[str, Any]) -> str:
    lines = [f"parity, dense and MoE in {report['dtype']}, {report['tokens']} random tokens:"]
    lines += ["  output of         max |dense - MoE|   max |dense|"]
    for row in report["layers"]:
        name = f"layer {row['layer']} ({'MoE' if row['moe'] else 'dense'})"
        lines.append(f"  {name:<18}{row['max_abs_diff']:>17.3e}{row['max_abs']:>14.3e}")
    lines.append(
        f"  {'logits':<18}{report['logits_max_abs_diff']:>17.3e}{report['logits_max_abs']:>14.3e}"
    )
    return "\n".join(lines)


def _summary(
    new: Plan,
    settings: Upcycling,
    args: argparse.Namespace,
    iteration_folder: str,
    report: dict[str, Any] | None,
) -> dict[str, Any]:
    run_args = new.common["args"]
    frequency = run_args.moe_layer_freq
    flags = [
        *("--load", str(args.target), "--finetune"),
        *("--num-experts", str(settings.num_experts)),
        *("--moe-router-topk", str(settings.topk)),
        *("--moe-ffn-hidden-size", str(run_args.moe_ffn_hidden_size)),
    ]
    if frequency != 1:
        flags += ["--moe-layer-freq", str(frequency).replace(" ", "")]
    return {
        "checkpoint": str(args.target),
        "iteration_folder": iteration_folder,
        "num_experts": settings.num_experts,
        "topk": settings.topk,
        "moe_layers": [layer for layer, is_moe in enumerate(new.moe_layers) if is_moe],
        "num_layers": len(new.moe_layers),
        "num_bytes": new.num_bytes,
        "dropped_entries": new.dropped,
        "seed": settings.seed,
        "parity": report,
        "megatron_flags": flags,
    }


def _print_summary(summary: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(summary))
        return
    print(
        f"wrote {summary['checkpoint']}: {summary['num_experts']} experts, top-{summary['topk']}, "
        f"in {len(summary['moe_layers'])} of {summary['num_layers']} layers, "
        f"{summary['num_bytes'] / 2**20:.1f} MiB"
    )
    if summary["parity"] is None:
        print("parity: not checked (--skip-parity)")
    print(
        "left out: optimizer, random-number and rerun state "
        f"({summary['dropped_entries']} entries); the optimizer starts afresh"
    )
    print("continue with the dense run's flags and:")
    print(f"  {shlex.join(summary['megatron_flags'])} --expert-model-parallel-size EP")
    print("  or, to keep the iteration and the place in the data, --no-load-optim --no-load-rng")
    print("  instead of --finetune")
    print(
        f"  EP: any divisor of {summary['num_experts']}. Routing that keeps parity is Megatron's "
        "default; --moe-router-pre-softmax would not."
    )


def _print_dry_run(new: Plan, as_json: bool) -> None:
    tensors = [entry for entry in new.content if isinstance(entry, NewTensor)]
    if as_json:
        sizes = {t.name: {"shape": t.info.shape, "num_bytes": t.info.num_bytes} for t in tensors}
        print(json.dumps({"names": new.name_map, "tensors": sizes, "num_bytes": new.num_bytes}))
        return
    for old, name in new.name_map:
        print(f"{old or '(new)'} -> {name}")
    for tensor in tensors:
        print(f"{tensor.info.num_bytes:>14} bytes  {tensor.name} {list(tensor.info.shape)}")
    print(f"{new.num_bytes:>14} bytes in all; {new.dropped} entries left out; nothing written")
