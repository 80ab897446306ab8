"""`ep-plugin convert`: a dense checkpoint becomes a Mixture-of-Experts that computes the same."""

import argparse
import contextlib
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ep_plugin.checkpoint import manifest
from ep_plugin.checkpoint.adapt.settings import Upcycling
from ep_plugin.checkpoint.adapt.upcycle import Plan, plan
from ep_plugin.checkpoint.conversion import is_hf
from ep_plugin.checkpoint.formats.megatron_dist import open_checkpoint, write_checkpoint
from ep_plugin.checkpoint.prompts import Prompts, read_prompts
from ep_plugin.checkpoint.staging import check_free, check_room, source_request, staged
from ep_plugin.checkpoint.tensors import Source, finite
from ep_plugin.commands.convert import translation
from ep_plugin.commands.convert.flags import add_arguments as add_arguments
from ep_plugin.commands.convert.flags import settings_from
from ep_plugin.commands.convert.say import parity_table, print_dry_run, print_summary, summary
from ep_plugin.errors import BackendUnavailable, ConfigError

PARITY_REPORT = "parity.json"
EXAMPLES = r"""examples:
  ep-plugin convert --from runs/dense --to runs/moe --num-experts 8 --topk 2
  ep-plugin convert --from runs/dense --to runs/moe --num-experts 64 --topk 8 \
      --mode granular --granularity 8 --layers every:2
  ep-plugin convert --from runs/dense/iter_0001000 --to runs/moe --num-experts 8 --topk 2 \
      --mode drop --drop-ratio 0.5 --drop-optimizer
  ep-plugin convert --from runs/dense --to runs/moe --num-experts 8 --topk 2 \
      --shared-expert copy --layers '[0]*1+[1]*3' --dry-run
  ep-plugin convert --check --to runs/moe

After a kill the same command goes on where it stopped.

modes:
  copy      every expert is the dense FFN (arXiv:2212.05055); the output is kept
  granular  --granularity g experts are one FFN, cut along its channels (arXiv:2410.07524); the
            output is kept with --router-init virtual-group
  drop      --drop-ratio of each expert's channels drawn anew (arXiv:2502.19261); not kept
  noise     copies with Gaussian noise of --noise-std; not kept
The output is kept to rounding where a token's weights are divided by their sum, as Megatron does by
default. Otherwise (--pre-softmax, top-1) experts are scaled for equal logits: exact with
--router-init zero, about right with a random router. The report says by how much the output is not
kept and why; parity fails only where it is to be kept.

The output is a Megatron torch_dist checkpoint that loads at any tensor-, pipeline- and
expert-parallel size. Optimizer state goes along: moments are copied to the experts.
Exit code 1: parity failed; 2: a setting or the input is wrong. Neither leaves an output behind.
"""
EXAMPLES += translation.EXAMPLES


class ParityFailed(Exception):
    """The new model does not compute what the dense one computed."""


def run(args: argparse.Namespace) -> int:
    """Convert. Returns 0, or 1 when parity failed; raises ConfigError for a user's mistake."""
    if args.check:
        return _check(args.target)
    if args.source is None:
        raise ConfigError("--from must be given; use --from runs/dense")
    if args.num_experts is None and (args.topk is not None or args.preset is not None):
        raise ConfigError("--topk and --preset need --num-experts; use --num-experts 8")
    settings = settings_from(args) if args.num_experts is not None else None
    if not args.parity_tolerance > 0:
        raise ConfigError(f"--parity-tolerance must be above 0; got {args.parity_tolerance}")
    if args.processes < 1:
        raise ConfigError(f"--processes must be at least 1; got {args.processes}")
    prompts = None
    if args.prompts is not None:
        prompts = read_prompts(args.prompts, args.source if is_hf(args.source) else None)
    if settings is None or translation.wanted(args):
        return translation.run(args, settings, prompts)
    if prompts is not None and args.skip_parity:
        raise ConfigError(
            "--prompts and --skip-parity contradict each other; leave one of them out"
        )
    check_free(args.target)
    source = finite(open_checkpoint(args.source))
    new = plan(source, settings, keep_optimizer=not args.drop_optimizer)
    if args.dry_run:
        print_dry_run(new, args.processes, args.json)
        return 0
    check_room(args.target, new.num_bytes)
    compare = None if args.skip_parity else _load_parity()
    report = None
    try:
        with staged(args.target, _request(args, settings, source)) as staging:
            with _progress(new) as on_bytes:
                written = write_checkpoint(
                    *(staging.folder, source, new.common, new.content, on_bytes),
                    *(staging.journal, args.processes),
                )
            if compare is not None:
                moe = staging.folder / source.folder.name
                report = _check_parity(compare, source.folder, moe, new, args, prompts)
            manifest.write(staging.folder, written, new.content, asdict(settings))
    except ParityFailed as error:
        print(f"ep-plugin convert: {error}", file=sys.stderr)
        return 1
    print_summary(summary(new, settings, args, source.folder.name, report), args.json)
    return 0


def _check(folder: Path) -> int:
    """Print what is wrong with a converted checkpoint's files; returns the exit code."""
    problems = manifest.check(folder)
    for problem in problems:
        print(f"ep-plugin convert: {problem}", file=sys.stderr)
    if not problems:
        print(f"{folder}: every file has the bytes that were written")
    return 1 if problems else 0


def _request(args: argparse.Namespace, settings: Upcycling, source: Source) -> dict[str, Any]:
    """Return all that the bytes of the result depend on."""
    request = {**source_request(source.folder), "--drop-optimizer": args.drop_optimizer}
    return {**request, **asdict(settings)}


def _load_parity() -> Callable[..., dict[str, Any]]:
    """Return `compare`; the one edge from here to Megatron, taken only when parity is wanted."""
    try:
        with translation.aside():
            module = importlib.import_module("ep_plugin.megatron.workers.model_run")
    except ImportError as error:
        raise BackendUnavailable(
            f"the parity check needs megatron-core with megatron.training ({error}); install "
            "'ep-plugin[megatron]', or use --skip-parity"
        ) from error
    compare: Callable[..., dict[str, Any]] = module.compare
    return compare


@contextlib.contextmanager
def _progress(new: Plan) -> Iterator[Callable[[int], object]]:
    bar = tqdm(total=new.num_bytes, unit="B", unit_scale=True, unit_divisor=1024, desc="convert")
    with bar:
        yield bar.update


def _check_parity(
    compare: Callable[..., dict[str, Any]],
    dense: Path,
    moe: Path,
    new: Plan,
    args: argparse.Namespace,
    prompts: Prompts | None,
) -> dict[str, Any]:
    """Compare the models and keep the report beside `moe`.

    Raises ParityFailed where the function is to be kept and is not.
    """
    with translation.aside():
        report = compare(dense, moe, seed=args.seed, prompts=prompts)
    difference, tolerance = report["logits_max_abs_diff"], args.parity_tolerance
    same = difference <= tolerance  # False for nan
    report |= {"tolerance": tolerance, "deviations": list(new.deviations), "same": same}
    report["passed"] = same or bool(new.deviations)
    (moe.parent / PARITY_REPORT).write_text(json.dumps(report, indent=2) + "\n")
    print(parity_table(report), file=sys.stderr if args.json else sys.stdout)
    if not report["passed"]:
        raise ParityFailed(
            f"parity failed: logits differ by {difference:.3e}, more than "
            f"--parity-tolerance {tolerance:.1e}; {args.target} was not written"
        )
    return report
