"""`ep-plugin convert`: a dense checkpoint becomes a Mixture-of-Experts that computes the same."""

import argparse
import contextlib
import importlib
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from tqdm import tqdm

from ep_plugin import presets
from ep_plugin.config import BackendUnavailable, ConfigError, ScoreFunction
from ep_plugin.convert import manifest, translation
from ep_plugin.convert.formats.megatron_dist import open_checkpoint, write_checkpoint
from ep_plugin.convert.gates import Gates
from ep_plugin.convert.report import parity_table, print_dry_run, print_summary, summary
from ep_plugin.convert.settings import MODES, RouterInit, SharedFrom, Upcycling
from ep_plugin.convert.staging import check_free, check_room, staged
from ep_plugin.convert.stream import Source, finite
from ep_plugin.convert.upcycle import Plan, plan
from ep_plugin.registry import available

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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--from", dest="source", type=Path, metavar="SOURCE",
        help="what --save named, or one iter_NNNNNNN folder; or a Hugging Face model",
    )  # fmt: skip
    parser.add_argument(
        "--to", dest="target", type=Path, required=True, metavar="TARGET",
        help="folder to write; must be missing or empty",
    )  # fmt: skip
    parser.add_argument("--num-experts", type=int, metavar="E")
    parser.add_argument(
        "--topk", type=int, metavar="K", help="experts per token (default: the preset's)"
    )
    parser.add_argument(
        "--layers", default="all", metavar="WHICH",
        help="which layers become MoE: all, every:N, or a pattern such as [0,1,0,1] (default: all)",
    )  # fmt: skip
    _add_upcycling(parser)
    parser.add_argument(
        "--seed", type=int, default=1234, help="of everything drawn (default: %(default)s)"
    )
    parser.add_argument(
        "--ep", type=int, metavar="EP",
        help="expert-parallel size of the run that continues; model weights load at any, but "
        "Megatron keeps the optimizer in another way at EP = 1 (default: above 1)",
    )  # fmt: skip
    parser.add_argument(
        "--drop-optimizer", action="store_true", help="leave the optimizer's state out"
    )
    parser.add_argument(
        "--parity-tolerance", type=float, default=1e-4, metavar="D",
        help="largest allowed difference of a logit in float32 (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--skip-parity", action="store_true", help="do not compare the models (needs no Megatron)"
    )
    translation.add_arguments(parser)
    parser.add_argument(
        "--processes", type=int, default=1, metavar="N",
        help="that write at once; each holds a tensor or two (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--check", action="store_true",
        help="compare the files of --to with its manifest.json instead; exit code 1: they differ",
    )  # fmt: skip
    parser.add_argument(
        "--dry-run", action="store_true", help="print names, sizes and expected time only"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")


def _add_upcycling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--mode", default="copy", metavar="MODE",
        help=f"what experts are made of: {', '.join(available(MODES))} (default: copy)",
    )  # fmt: skip
    parser.add_argument(
        "--granularity", type=int, default=1, metavar="G", help="experts an FFN is cut into"
    )
    parser.add_argument(
        "--drop-ratio", type=float, default=0.5, metavar="R", help="of mode drop (default: 0.5)"
    )
    parser.add_argument(
        "--noise-std", type=float, default=0.01, metavar="S",
        help="of mode noise, relative to the weights' (default: 0.01)",
    )  # fmt: skip
    parser.add_argument(
        "--router-init", choices=get_args(RouterInit),
        help="normal: random rows; virtual-group: random, equal for the experts of one FFN (the "
        "default, and needed to keep the output, in mode granular); zero: equal logits, keeps the "
        "output whatever the gates, but the same experts see every token at first",
    )  # fmt: skip
    parser.add_argument(
        "--shared-expert", choices=get_args(SharedFrom), default="none",
        help="copy: the dense FFN beside the experts, each side with half of the output; learned: "
        "weighed by a learned softmax, as --ep-shared-expert learned. Both keep the output",
    )  # fmt: skip
    parser.add_argument(
        "--preset", metavar="NAME", help="take top-k and gates of a system of `ep-plugin presets`"
    )
    parser.add_argument(
        "--score-function", choices=get_args(ScoreFunction), help="of the gates (default: softmax)"
    )
    parser.add_argument(
        "--pre-softmax", action="store_true", default=None,
        help="softmax over all experts, not divided by the sum of the chosen",
    )  # fmt: skip
    parser.add_argument("--scaling-factor", type=float, metavar="F", help="of the gates")


def settings_from(args: argparse.Namespace) -> Upcycling:
    """Return the settings; what is given beside --preset wins over it."""
    gates: dict[str, Any] = {}
    topk = args.topk
    if args.preset is not None:
        preset = presets.load(args.preset)
        if preset.router != "topk":
            raise ConfigError(
                f"--preset {args.preset} lets experts choose their tokens, so no token's weights "
                "have a known sum; --topk 2 would do, with --ep-router expert_choice in the run"
            )
        gates, topk = vars(Gates.of(preset.routing)), topk or preset.routing.topk
    if topk is None:
        raise ConfigError("--topk, or a --preset that has it, must be given; --topk 2 would do")
    for name in ("score_function", "pre_softmax", "scaling_factor"):
        if getattr(args, name) is not None:
            gates = {**gates, name: getattr(args, name)}
    default_init: RouterInit = "virtual-group" if args.mode == "granular" else "normal"
    router_init: RouterInit = args.router_init or default_init
    return Upcycling(
        num_experts=args.num_experts,
        topk=topk,
        layers=args.layers,
        seed=args.seed,
        mode=args.mode,
        granularity=args.granularity,
        drop_ratio=args.drop_ratio,
        noise_std=args.noise_std,
        router_init=router_init,
        shared_expert=args.shared_expert,
        gates=Gates(**gates),
        ep=args.ep,
    )


def run(args: argparse.Namespace) -> int:
    """Convert. Returns 0, or 1 when parity failed; raises ConfigError for a user's mistake."""
    if args.check:
        return _check(args.target)
    if args.source is None:
        raise ConfigError("--from must be given; --from runs/dense would do")
    if args.num_experts is None and (args.topk is not None or args.preset is not None):
        raise ConfigError("--topk and --preset need --num-experts; --num-experts 8 would do")
    settings = settings_from(args) if args.num_experts is not None else None
    if not args.parity_tolerance > 0:
        raise ConfigError(f"--parity-tolerance must be above 0; got {args.parity_tolerance}")
    if args.processes < 1:
        raise ConfigError(f"--processes must be at least 1; got {args.processes}")
    if settings is None or translation.wanted(args):
        return translation.run(args, settings)
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
                report = _check_parity(compare, source.folder, moe, new, args)
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
    stats = {path.name: path.stat() for path in sorted(source.folder.iterdir())}
    return {
        "--from": str(source.folder.absolute()),
        "its files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
        "--drop-optimizer": args.drop_optimizer,
        **asdict(settings),
    }


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
    compare: Callable[..., dict[str, Any]],
    dense: Path,
    moe: Path,
    new: Plan,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Compare the models and keep the report beside `moe`.

    Raises ParityFailed where the function is to be kept and is not.
    """
    with _aside():
        report = compare(dense, moe, seed=args.seed)
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
