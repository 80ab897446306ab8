"""`ep-plugin bench`: time the layer, its products or its kernels beside their peers."""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ep_plugin.commands.bench import over_ranks, products_alone, steps_alone, whole_layer
from ep_plugin.commands.bench.best import both_figures
from ep_plugin.commands.bench.case import ROUTINGS, require_cuda
from ep_plugin.commands.bench.contest import OURS, Contest
from ep_plugin.commands.bench.figures import (
    Row,
    merge,
    other_sources,
    read,
    table,
    versions,
    write,
)
from ep_plugin.commands.bench.floors import GRADIENTS, PRECISIONS, Work, explain, told
from ep_plugin.commands.bench.measure import Protocol, default_device, rates
from ep_plugin.commands.bench.shapes import MODELS, TINY, Shape, pick
from ep_plugin.commands.bench.which_flags import BACKENDS, NEEDS
from ep_plugin.errors import BackendUnavailable, ConfigError, closest
from ep_plugin.extras import pip_install
from ep_plugin.untrusted import shown
from ep_plugin.written import check_picture, check_place, write_picture, write_whole

__all__ = ["NEEDS", "add_arguments", "run"]
EXAMPLES = """examples:
  ep-plugin bench layer --output benchmarks/results/layer_h100.json --plot layer_h100.png
  ep-plugin bench layer --shapes q3-30b --routing balanced zipf one_empty half
  ep-plugin bench layer --shapes mixtral --backends ep_plugin torch --cuda-graph
  ep-plugin bench layer --shapes q3-30b gpt-oss-120b --explain        the floors, term by term
  ep-plugin bench gemm --precision fp8 --output benchmarks/results/gemm_h100.json --resume
  ep-plugin bench kernels --shapes tiny --repeats 5 --warm 1 --json
  torchrun --nproc-per-node 2 -m ep_plugin.cli bench overlap --shapes dsv3 --trace trace.json

layer    router to combine, forward and backward, quantisation included; that of the weights is
         counted at 1/8 (eight micro-batches an optimizer step) and given in full beside it
gemm     each grouped product of fc1 and fc2 alone, operands already quantised
kernels  each memory-bound step alone, against this device's copy bandwidth
overlap  the layer over ranks: exchanges alone, computation alone, together, and the share hidden

Random data in three sets taken in turn; all backends in turn in one process; medians. Weights,
tokens and gradients are the same for every backend, and tokens are made such that each backend's
own router sends them to the same experts. Weight gradients are made anew in bf16, or added to fp32
totals as training does: a row each. A floor counts what its row does, at the rates of this GPU,
measured in the same run; --explain prints its terms. Of Megatron two figures are printed, as its
users get it and its best, with the switches; NVTE_USE_CUTLASS_GROUPED_GEMM=1 in the environment
adds `+cutlass` to names. Peers that cannot run are named with the reason. Without a GPU, tiny is
the default shape, ratios to torch are printed in place of times, and rates are assumed.

Shapes are what one rank computes of a published model:
  dsv3         DeepSeek-V3
  q3-235b      Qwen3-235B-A22B at ep = 8
  q3-30b-ep8   Qwen3-30B-A3B at ep = 8
  q3-30b       Qwen3-30B-A3B, all of its experts
  mixtral      Mixtral 8x7B
and, where they are named, all experts of
  gpt-oss-120b, qwen3-next, glm-4.5-air, olmoe, deepseek-v2-lite
  mixtral-1024, mixtral-256       Mixtral 8x7B, fewer tokens
  tiny         for a quick look, on any machine
"""
MOST_ROUNDS = 1_000_000
BENCHES: dict[str, Callable[[Contest, Shape, str], Iterable[Row]]] = {
    "layer": whole_layer.measure,
    "gemm": products_alone.measure,
    "kernels": steps_alone.measure,
    "overlap": over_ranks.measure,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("bench", metavar="BENCH", help=", ".join(BENCHES))
    for name, summary in (
        ("shapes", "sizes, listed below (default: the first five; without a GPU tiny)"),
        ("backends", "ep_plugin or peers; one asked for by name runs, or the command fails"),
        ("skip", "backends to leave out"),
        ("precision", f"{', '.join(PRECISIONS)} (default: both)"),
        ("routing", f"{', '.join(ROUTINGS)} (default: balanced)"),
        ("gradients", f"{', '.join(GRADIENTS)} (default: both)"),
        ("recipes", f"overlap: {', '.join(over_ranks.RECIPES)} (default: all)"),
        ("dispatchers", f"overlap: {', '.join(over_ranks.DISPATCHERS)} (default: all)"),
    ):
        parser.add_argument(f"--{name}", nargs="+", default=[], metavar="NAME", help=summary)
    for name, default, summary in (
        ("repeats", 100, "that are timed"),
        ("warm", 20, "to warm up, not timed"),
    ):
        parser.add_argument(
            f"--{name}", type=int, default=default, help=f"rounds {summary} (default: {default})"
        )
    for name, summary in (
        ("cuda-graph", "layer, overlap: steps as CUDA graphs where a backend allows it"),
        ("resume", "keep the rows that are in --output, and measure only the others"),
        ("json", "print the rows on stdout"),
        ("explain", "layer: print the terms of the floors, and measure no more than the rates"),
    ):
        parser.add_argument(f"--{name}", action="store_true", help=summary)
    for name, summary in (
        ("output", "JSON; equal rows are replaced"),
        ("plot", "PNG"),
        ("trace", "overlap: two steps in chunks, to look at in Perfetto"),
        ("trace-plot", "overlap: the second of them as a PNG"),
    ):
        parser.add_argument(f"--{name}", type=Path, metavar="FILE", help=f"where to: {summary}")


def run(args: argparse.Namespace) -> int:
    """Measure, print, write; 2 where nothing could be measured. With --explain print alone.

    Raises ConfigError for unknown names and unreadable files.
    """
    _check(args)
    # before minutes of measuring
    plot = _load("plot", "--plot") if args.plot is not None else None
    picture = _load("timeline_plot", "--trace-plot") if args.trace_plot is not None else None
    _check_places(args)
    device = default_device()
    if args.cuda_graph:
        require_cuda("--cuda-graph", device, "a run without it")
    if args.bench == "overlap":
        over_ranks.join_ranks(device)
    shapes = pick(args.shapes) or list(MODELS if device.type == "cuda" else [TINY])
    if args.explain:
        print(_explained(args, shapes, Protocol(device, warm=5, repeats=20)))
        return 0
    kept = read(args.output) if args.output is not None else []
    protocol = Protocol(
        *(device, args.warm, args.repeats),
        hide_launch=args.bench in ("gemm", "kernels"),
        align=dist.barrier if args.bench == "overlap" else None,
    )
    contest = Contest(
        protocol,
        tuple(args.precision) or PRECISIONS,
        tuple(args.backends),
        args.cuda_graph,
        [row for row in kept if row.get("bench") == args.bench] if args.resume else [],
        tuple(args.recipes),
        tuple(args.dispatchers),
        tuple(args.gradients) or GRADIENTS,
        rates(protocol),
        tuple(args.skip),
    )
    with contextlib.redirect_stdout(sys.stderr if args.json else sys.stdout):  # some peers print
        rows, kept = _measure(args, contest, shapes, kept)
    code = 0 if rows else 2
    traced = args.trace is not None or picture is not None
    if traced:
        routing = (args.routing or ["balanced"])[0]
        timeline = over_ranks.trace(shapes[0], routing, device, args.cuda_graph)
    if args.bench == "overlap":
        over_ranks.leave_ranks()
        if os.environ["RANK"] != "0":
            return code
    for line in (*_resumed_of_others(contest.kept, args.output), *contest.absentees()):
        print(f"not measured: {line}", file=sys.stderr if args.json else sys.stdout)
    # Before any file: a disk that is full loses no figures.
    lines = [table(rows), *both_figures(rows)]
    print(json.dumps(rows) if args.json else "\n".join(lines), flush=True)
    if args.output is not None:
        write(args.output, kept)
    if args.trace is not None:
        write_whole(args.trace, json.dumps(timeline))
    if picture is not None:
        write_picture(args.trace_plot, picture.draw(timeline), dpi=144)
    if plot is not None:
        write_picture(args.plot, plot.draw(rows), dpi=144)
    return code


def _explained(args: argparse.Namespace, shapes: list[Shape], protocol: Protocol) -> str:
    """Return the terms of each shape's floors, and the rates they stand on."""
    found = rates(protocol)
    works = [
        Work(shape, precision, gradients)
        for shape in shapes
        for precision in args.precision or PRECISIONS
        for gradients in args.gradients or GRADIENTS
    ]
    return "\n".join([told(found.facts()), *(explain(work, found) for work in works)])


def _check_places(args: argparse.Namespace) -> None:
    """Raise ConfigError, before minutes of measuring, for a place that cannot be written to."""
    for flag, path in (("--plot", args.plot), ("--trace-plot", args.trace_plot)):
        if path is not None:
            check_picture(path, flag)
    for path in (args.output, args.trace):
        if path is not None:
            check_place(path)


def _check(args: argparse.Namespace) -> None:
    _check_choice("BENCH", args.bench, tuple(BENCHES))
    for name, legal in (
        *(("precision", PRECISIONS), ("routing", ROUTINGS), ("gradients", GRADIENTS)),
        *(("recipes", over_ranks.RECIPES), ("dispatchers", tuple(over_ranks.DISPATCHERS))),
    ):
        for value in getattr(args, name):
            _check_choice(f"--{name}", value, legal)
    for name, least in (("repeats", 1), ("warm", 0)):
        value = getattr(args, name)
        if value > MOST_ROUNDS:
            raise ConfigError(
                f"--{name} must be at most {MOST_ROUNDS}; got {value}; use --{name} 100"
            )
        if value < least:
            raise ConfigError(
                f"--{name} must be at least {least}; got {value}; use --{name} {least}"
            )
    legal_backends = BACKENDS[args.bench]
    for flag, fit in (("backends", OURS), ("skip", legal_backends[-1])):
        for value in getattr(args, flag):
            if value not in legal_backends:
                raise ConfigError(
                    f"--{flag} must be among {', '.join(legal_backends)}; got {shown(value)}; use "
                    f"--{flag} {fit}"
                )


def _check_choice(name: str, value: str, legal: tuple[str, ...]) -> None:
    """Raise ConfigError, with the name that may be meant, unless `value` is one of `legal`."""
    if value not in legal:
        typed = "bench" if name == "BENCH" else name
        raise ConfigError(
            f"{name} must be one of {', '.join(legal)}; got {shown(value)}; use {typed} "
            f"{closest(value, legal)[0]}"
        )


def _measure(
    args: argparse.Namespace, contest: Contest, shapes: list[Shape], kept: list[Row]
) -> tuple[list[Row], list[Row]]:
    """Return the rows of this run and those it resumed, and all of --output.

    They are written as they come; where that fails, `run` says so once all are printed.
    """
    rows = contest.kept
    for shape in shapes:
        for routing in args.routing or ["balanced"]:
            for row in BENCHES[args.bench](contest, shape, routing):
                rows, kept = merge(rows, [row]), merge(kept, [row])
                if args.output is not None and os.environ.get("RANK", "0") == "0":
                    with contextlib.suppress(ConfigError):
                        write(args.output, kept)
    return rows, kept


def _resumed_of_others(kept: list[Row], output: Path | None) -> list[str]:
    """Return a line about the rows that --resume kept and other sources measured, if any."""
    others = other_sources(kept)
    if not others:
        return []
    return [
        f"{len(others)} of the rows that --resume kept of {output}: sources of ep_plugin "
        f"{', '.join(sorted(set(others)))} measured them, and these are "
        f"{versions()['ep-plugin']!r}; without --resume all are measured anew"
    ]


def _load(module: str, flag: str) -> Any:
    try:
        return import_module(f"ep_plugin.commands.bench.{module}")
    except ImportError as error:
        raise BackendUnavailable(
            f"{flag} needs matplotlib ({error}); use {pip_install('report')}"
        ) from error
