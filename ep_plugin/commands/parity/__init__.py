"""`ep-plugin parity`: do these layouts compute what one rank computes? On the user's own script.

`layouts.py` reads them, `comparable.py` makes their runs comparable, `tiny.py` small, and
`by_nature.py` sets aside what differs anyway. `runs.py` and `launch.py` run them, `differences.py`
reads what they left (`ep_plugin/megatron/workers/layout_run.py`), `shown.py` shows it.
"""

import argparse
import json
import os
import shlex
import sys
from collections import Counter
from pathlib import Path

from ep_plugin.commands.law import Parser
from ep_plugin.commands.parity.by_nature import SetAside, set_aside
from ep_plugin.commands.parity.comparable import Arguments, comparable, expand_preset
from ep_plugin.commands.parity.launch import RunFailed
from ep_plugin.commands.parity.layouts import ONE_RANK, Layout, parse
from ep_plugin.commands.parity.runs import compare
from ep_plugin.commands.parity.shown import table
from ep_plugin.commands.parity.sizes import check_resumes, check_sizes
from ep_plugin.commands.parity.tiny import default_layout, shrink
from ep_plugin.errors import ConfigError
from ep_plugin.untrusted import shown
from ep_plugin.written import check_place, write_whole

EXAMPLES = r"""examples:
  ep-plugin parity pretrain_gpt.py --tiny
  ep-plugin parity pretrain_gpt.py "${ARGS[@]}" --tiny --layouts ep=2 tp=2,ep=2 pp=2,ep=2
  ep-plugin parity pretrain_gpt.py "${ARGS[@]}" --tiny --resume --layouts ep=4 tp=2,ep=2,etp=1 \
      --output parity.json

ARGS are those of your own run. Each layout runs a few iterations from one rank's weights, on the
same batches, in fp32 and without dropout; what that changes in ARGS is printed, and so is what
differs between layouts by nature and is set aside. A layout takes as
few ranks as it can; dp=N gives it more. Where there are GPUs enough they are used, else the CPU.
Exit code 1: a layout differs, or did not run; 2: a setting is wrong.
"""


LARGEST = 1e30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("script", metavar="SCRIPT", nargs="?", help="your pretrain script")
    parser.add_argument(
        "arguments", nargs=argparse.REMAINDER, metavar="ARGS",
        help="the flags of SCRIPT, then those of this command",
    )  # fmt: skip
    add_flags(parser)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that also stand behind those of the script."""
    parser.add_argument(
        "--layouts",
        nargs="+",
        metavar="LAYOUT",
        help="such as ep=2 tp=2,ep=2 pp=2,ep=2,dp=4 (default: ep=2, or tp=2 without experts)",
    )
    parser.add_argument("--tiny", action="store_true", help="shrink the model, on random data")
    parser.add_argument(
        "--iterations",
        type=int,
        default=3,
        metavar="N",
        help="iterations of each run (default: %(default)s)",
    )
    parser.add_argument(
        "--resume", action="store_true",
        help="save after N iterations and run N more; each layout also resumes what the one before "
        "it saved, and must go on as one rank does",
    )  # fmt: skip
    parser.add_argument(
        "--tolerance", type=float, default=1e-5, metavar="D",
        help="largest relative difference of a loss or norm; ten times that of a gradient "
        "(default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where to run; auto: GPUs where there are enough, else the CPU (default: auto)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the JSON object here")


def run(args: argparse.Namespace) -> int:
    """Compare. Returns 0, or 1 when a layout differs; raises ConfigError for a user's mistake."""
    theirs = _read_own(args)
    _check_script(args.script)
    _check_numbers(args)
    if args.output is not None:
        check_place(args.output)
    expanded = expand_preset(theirs)
    if args.layouts is None:
        args.layouts = [default_layout(expanded, args.tiny)]
    layouts = _layouts(args.layouts)
    edits = [comparable(expanded, args.iterations * (2 if args.resume else 1))]
    if args.tiny:
        edits.append(shrink(edits[0].all, [ONE_RANK, *layouts]))
    check_sizes(edits[-1].all, layouts)
    if args.resume:
        check_resumes(edits[-1].all, layouts)
    arguments, aside = set_aside(edits[-1].all, layouts)
    if not args.json:
        _print_edits(args, edits, aside)
    try:
        comparisons = compare(args, layouts, arguments)
    except RunFailed as error:
        print(f"ep-plugin parity: {error}", file=sys.stderr)
        return 1
    passed = all(comparison.passed for comparison in comparisons)
    report = {
        "passed": passed,
        "script": args.script,
        "arguments": arguments,
        "removed": [word for edit in edits for word in edit.removed],
        "set_aside": [setting.as_dict() for setting in aside],
        "layouts": [comparison.as_dict() for comparison in comparisons],
    }
    print(json.dumps(report) if args.json else table(comparisons), flush=True)
    if args.output is not None:
        write_whole(args.output, json.dumps(report, indent=2) + "\n")
    return 0 if passed else 1


def _read_own(args: argparse.Namespace) -> list[str]:
    """Take this command's flags from behind the script's into `args`; return the script's."""
    own = Parser("ep-plugin parity", allow_abbrev=False, add_help=False)
    add_flags(own)
    _, theirs = own.parse_known_args(args.arguments, namespace=args)
    return theirs


def _check_script(script: str | None) -> None:
    if script is None:
        raise ConfigError(
            "SCRIPT is missing, and stands first; use ep-plugin parity pretrain_gpt.py with its "
            "flags, then the flags of parity"
        )
    if not os.path.isfile(script):
        raise ConfigError(
            f"SCRIPT must be a Python file; got {shown(script)}, which is not here; use the path "
            "of your pretrain script"
        )


def _check_numbers(args: argparse.Namespace) -> None:
    if args.iterations < (least := 2 if args.resume else 1):
        raise ConfigError(
            f"--iterations must be at least {least}; got {args.iterations}; use "
            f"--iterations {least}"
        )
    if not 0 < args.tolerance < LARGEST:
        raise ConfigError(
            f"--tolerance must be above 0 and finite; got {args.tolerance}; use --tolerance 1e-5"
        )


def _layouts(texts: list[str]) -> list[Layout]:
    for text, times in Counter(texts).items():
        if times > 1:
            raise ConfigError(f"--layouts has {text} {times} times; use it once")
    return [parse(text) for text in texts]


def _print_edits(args: argparse.Namespace, edits: list[Arguments], aside: list[SetAside]) -> None:
    removed = [word for edit in edits for word in edit.removed]
    added = [word for edit in edits for word in edit.added]
    print(f"{args.script}, in fp32 and deterministic{', tiny' if args.tiny else ''}")
    print(f"  without: {shlex.join(removed) or '-'}")
    print(f"  with:    {shlex.join(added)}", flush=True)
    for setting in aside:
        print(
            f"  set aside, since it differs between layouts by nature: {setting.text}", flush=True
        )
