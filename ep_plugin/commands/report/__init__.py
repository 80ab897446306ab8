"""`ep-plugin report`: what happened in a run, as HTML, PNG and JSON."""

import argparse
import json
from importlib import import_module
from pathlib import Path
from typing import Any

from ep_plugin.errors import BackendUnavailable, ConfigError
from ep_plugin.extras import pip_install
from ep_plugin.written import cannot, write_picture, write_whole

EXAMPLES = """examples:
  ep-plugin report --run runs/quickstart               of recipes/quickstart.sh
  ep-plugin report --run runs/qwen3-nano-ep2           of recipes/run.sh
  ep-plugin report --run ep-plugin-1234.log            the log of a Slurm job
  ep-plugin report --run tensorboard train.log         of your own script: events and output
  ep-plugin report --run checkpoints --to pictures     they name the TensorBoard folder
  ep-plugin report --run runs/qwen3-nano-ep2 --json

Everything that is found below the paths is drawn, and what is missing is said. Written are
report.html, which stands alone, its pictures and summary.json: into --to, or else into a folder
report in the path, or beside a log. A quickstart's report, with the losses before and after the
conversion, is written into its own folder.
"""
RUNS = ("dense", "moe")
NOTED = ("experts", "topk", "ep", "ranks", "device", "resumed_at_iteration")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument(
        "--run", type=Path, required=True, nargs="+", metavar="PATH",
        help="what the run left: its folder, a TensorBoard folder, a log, a checkpoint folder",
    )  # fmt: skip
    parser.add_argument(
        "--to", type=Path, metavar="FOLDER", help="where to write (default: see below)"
    )
    for name, kind, summary in (
        ("experts", int, "experts per layer"),
        ("topk", int, "experts per token"),
        ("ep", int, "expert-parallel ranks"),
        ("ranks", int, "ranks in all"),
        ("device", str, "cpu or cuda"),
        ("resumed-at-iteration", int, "where the second half was taken up"),
    ):
        parser.add_argument(f"--{name}", type=kind, help=f"noted in the summary: {summary}")
    parser.add_argument("--json", action="store_true", help="print the summary on stdout")


def run(args: argparse.Namespace) -> int:
    """Write the report; raises ConfigError for a path that leads to no run."""
    first = args.run[0]
    if len(args.run) == 1 and all((first / "tensorboard" / name).is_dir() for name in RUNS):
        return _quickstart(args, first)
    return _any_run(args)


def _any_run(args: argparse.Namespace) -> int:
    _, _, page, _ = _load()
    any_run = import_module("ep_plugin.commands.report.any_run")
    values, found = any_run.read(args.run)
    noted = {name: value for name in NOTED if (value := getattr(args, name)) is not None}
    facts = {**any_run.facts(values), **found.facts, **noted}
    facts |= {"read": [str(place) for place in (*found.events, *found.logs)]}
    facts["missing"] = found.missing
    first = args.run[0]
    beside = first / "report" if first.is_dir() else first.with_name(f"{first.stem}-report")
    folder = _folder(args.to, beside)
    pictures = _save(folder, any_run.draw(values))
    title = f"Run {first.resolve().name}"
    text = page.make_page(title, any_run.readable(facts), pictures, found.missing)
    _finish(args, folder, text, facts)
    if not args.json:
        for line in found.missing:
            print(f"missing: {line}")
    return 0


def _quickstart(args: argparse.Namespace, source: Path) -> int:
    read_run, figures, page, summary = _load()
    runs = {name: read_run(source / "tensorboard" / name) for name in RUNS}
    facts = {**summary.measured(source), **{name: getattr(args, name) for name in NOTED}}
    folder = _folder(args.to, source)
    pictures = _save(folder, _drawn(runs, figures))
    text = page.make_page("Dense to Mixture-of-Experts", _readable(facts), pictures)
    _finish(args, folder, text, facts)
    return 0


def _finish(args: argparse.Namespace, folder: Path, text: str, facts: dict[str, Any]) -> None:
    write_whole(folder / "report.html", text, follow=False)
    write_whole(folder / "summary.json", json.dumps(facts, indent=2) + "\n", follow=False)
    print(json.dumps(facts) if args.json else f"wrote {folder / 'report.html'}")


def _folder(asked: Path | None, beside: Path) -> Path:
    """Return where to write; raises ConfigError for a link in the run, which somebody else set."""
    if asked is None and beside.is_symlink() and beside.name == "report":
        raise ConfigError(f"{beside} is a link to another place; use --to FOLDER")
    folder = asked or beside
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise ConfigError(cannot("written", folder, error)) from error
    return folder


def _load() -> tuple[Any, Any, Any, Any]:
    try:
        events = import_module("ep_plugin.commands.report.events")
        figures = import_module("ep_plugin.commands.report.pictures")
    except ImportError as error:
        raise BackendUnavailable(
            f"reports need matplotlib and tensorboard ({error}); use {pip_install('report')}"
        ) from error
    page = import_module("ep_plugin.commands.report.html")
    summary = import_module("ep_plugin.commands.report.summary")
    return events.read_run, figures, page, summary


def _save(folder: Path, drawn: list[tuple[str, str, str, Any]]) -> list[tuple[str, str, Path]]:
    """Write the pictures; return (heading, caption, file) of each."""
    for _, _, name, figure in drawn:
        write_picture(folder / name, figure, dpi=144, follow=False)
    return [(heading, caption, folder / name) for heading, caption, name, _ in drawn]


def _drawn(runs: dict[str, Any], figures: Any) -> list[tuple[str, str, str, Any]]:
    """Return the pictures of a quickstart: heading, caption, file, figure."""
    if not runs["moe"].shares():
        raise ConfigError(
            "--run must have loads of experts in tensorboard/moe, and there are none; use a folder "
            "that recipes/quickstart.sh finished"
        )
    return [
        (
            "Loss",
            "The converted model starts where the dense one ended, on the same validation data.",
            "loss.png",
            figures.loss_figure(runs["dense"], runs["moe"]),
        ),
        (
            "Balance",
            "Load-balancing loss, mean over layers; 1 when every expert gets the same.",
            "balance.png",
            figures.balance_figure(runs["moe"]),
        ),
        (
            "Tokens per expert",
            "Each expert's share of its layer's rows between two logs; the white line on the scale "
            "is an even share.",
            "experts.png",
            figures.experts_figure(runs["moe"]),
        ),
    ]


def _readable(facts: dict[str, Any]) -> dict[str, object]:
    return {
        "validation loss, dense at its end": f"{facts['dense_final_val_loss']:.4f}",
        "validation loss, converted, before its first step": f"{facts['moe_initial_val_loss']:.4f}",
        "validation loss, Mixture-of-Experts at its end": f"{facts['moe_final_val_loss']:.4f}",
        "largest difference of a logit after conversion": f"{facts['parity_max_abs_diff']:.1e}",
        "experts per layer, per token": f"{facts['experts']}, {facts['topk']}",
        "ranks, expert-parallel": f"{facts['ranks']}, {facts['ep']} ({facts['device']})",
        "resumed at iteration": facts["resumed_at_iteration"],
        "seconds, all steps": facts["seconds"],
        "peak memory of a step, all ranks": f"{facts['peak_rss_gib']} GiB",
    }
