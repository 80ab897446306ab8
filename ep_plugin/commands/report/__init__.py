"""`ep-plugin report`: what happened in a quickstart run, as HTML, PNG and JSON."""

import argparse
import json
from importlib import import_module
from pathlib import Path
from typing import Any

from ep_plugin.errors import BackendUnavailable, ConfigError

EXAMPLES = """examples:
  ep-plugin report --run runs/quickstart
  ep-plugin report --run runs/quickstart --json

A run folder holds tensorboard/dense and tensorboard/moe, logs/*.usage.json, logs/evaluate-*.log and
converted/parity.json, as recipes/quickstart.sh leaves them. Written into it:
report.html, loss.png, balance.png, experts.png, summary.json.
"""
RUNS = ("dense", "moe")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="the run's folder")
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
    """Write the report; raises ConfigError for a folder that is no run."""
    read_run, figures, page, summary = _load()
    for name in RUNS:
        if not (args.run / "tensorboard" / name).is_dir():
            raise ConfigError(
                f"--run must hold tensorboard/{name}; {str(args.run)!r} does not; use a folder "
                "that recipes/quickstart.sh made"
            )
    runs = {name: read_run(args.run / "tensorboard" / name) for name in RUNS}
    noted = ("experts", "topk", "ep", "ranks", "device", "resumed_at_iteration")
    facts = {
        **summary.measured(args.run),
        **{name: getattr(args, name) for name in noted},
    }
    pictures = _draw(args.run, runs, figures)
    text = page.make_page("Dense to Mixture-of-Experts", _readable(facts), pictures)
    (args.run / "report.html").write_text(text)
    (args.run / "summary.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts) if args.json else f"wrote {args.run / 'report.html'}")
    return 0


def _load() -> tuple[Any, Any, Any, Any]:
    try:
        events = import_module("ep_plugin.commands.report.events")
        figures = import_module("ep_plugin.commands.report.pictures")
    except ImportError as error:
        raise BackendUnavailable(
            f"reports need matplotlib and tensorboard ({error}); use "
            "pip install 'ep-plugin[report]'"
        ) from error
    page = import_module("ep_plugin.commands.report.html")
    summary = import_module("ep_plugin.commands.report.summary")
    return events.read_run, figures, page, summary


def _draw(folder: Path, runs: dict[str, Any], figures: Any) -> list[tuple[str, str, Path]]:
    """Write the pictures; return (heading, caption, file) of each."""
    drawn = [
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
    for _, _, name, figure in drawn:
        figure.savefig(folder / name, dpi=144)
    return [(heading, caption, folder / name) for heading, caption, name, _ in drawn]


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
