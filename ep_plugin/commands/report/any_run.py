"""The report of any run of Megatron's loop: what it logged is drawn, what it did not is said."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ep_plugin.commands.report import pictures
from ep_plugin.commands.report.events import BALANCE, TRAIN, VALIDATION, Run, read_events
from ep_plugin.commands.report.find import Found, find
from ep_plugin.commands.report.logs import read_log
from ep_plugin.errors import ConfigError
from ep_plugin.untrusted import cut

MAX_LAYERS = pictures.MAX_LAYERS
_ABSENT = {  # tag -> what a reader should know
    VALIDATION: "validation loss: none was logged (--eval-interval, --eval-iters)",
    BALANCE: "load-balancing loss: none was logged above 0 (--moe-aux-loss-coeff)",
    "iteration-time": "seconds per iteration: only in the run's output; name that file too",
}
_NO_SHARES = "tokens per expert: only in TensorBoard, of runs with the plugin (--tensorboard-dir)"
Picture = tuple[str, str, str, Any]  # heading, caption, name of the file, figure


def read(paths: Sequence[Path]) -> tuple[Run, Found]:
    """Return a run's values and where they were; raises ConfigError without a training loss.

    TensorBoard's count where an iteration is in a log as well.
    """
    found = find(paths)
    values: dict[str, dict[int, float]] = {}
    for log in found.logs:
        for tag, series in read_log(log).items():
            values.setdefault(tag, {}).update(series)
    for folder in found.events:
        for tag, series in read_events(folder).items():
            values[tag] = values.get(tag, {}) | series
    if TRAIN not in values:
        places = ", ".join(str(place) for place in (*found.events, *found.logs))
        raise ConfigError(
            f"a run must have logged {TRAIN!r}; {places} has {cut(str(sorted(values)))}; use a "
            "run longer than its --log-interval"
        )
    run = Run({tag: sorted(series.items()) for tag, series in values.items()})
    drawn = {tag for tag, series in run.scalars.items() if any(value for _, value in series)}
    found.missing += [sentence for tag, sentence in _ABSENT.items() if tag not in drawn]
    if not run.shares():
        found.missing.append(_NO_SHARES)
    return run, found


def facts(run: Run) -> dict[str, Any]:
    """Return the figures of a run; None where something was not logged. Losses in nats."""
    shares = [
        series[-1][1] * len(experts)
        for experts in run.shares().values()
        for series in experts.values()
    ]
    seconds = [value for _, value in run.series("iteration-time")[1:]]
    return {
        "iterations": run.series(TRAIN)[-1][0],
        "train_loss": _last(run, TRAIN),
        "val_loss": _last(run, VALIDATION),
        "load_balancing_loss": _last(run, BALANCE),
        "fullest_expert": _number(max(shares, default=None)),
        "seconds_per_iteration": _number(statistics.median(seconds) if seconds else None),
    }


def readable(values: dict[str, Any]) -> dict[str, object]:
    """Return the figures for a page."""
    names = {
        "iterations": "iterations",
        "train_loss": "training loss at the end",
        "val_loss": "validation loss at the end",
        "load_balancing_loss": "load-balancing loss at the end (1: even)",
        "fullest_expert": "rows of the fullest expert at the end, over an even share",
        "seconds_per_iteration": "seconds per iteration, median",
        "experts": "experts per layer",
        "topk": "experts per token",
        "ep": "expert-parallel ranks",
        "ranks": "ranks",
        "device": "device",
    }
    return {
        text: f"{values[name]:.4g}" if isinstance(values[name], float) else values[name]
        for name, text in names.items()
        if values.get(name) is not None
    }


def draw(run: Run) -> list[Picture]:
    """Return the pictures of what the run logged."""
    drawn = [
        ("Loss", "Training and validation.", "loss.png", pictures.one_loss_figure(run)),
    ]
    if any(value for _, value in run.series(BALANCE)):
        caption = "Load-balancing loss, mean over layers; 1 when every expert gets the same."
        drawn.append(("Balance", caption, "balance.png", pictures.balance_figure(run)))
    if shares := run.shares():
        layers = list(shares)
        chosen = [layers[i * len(layers) // MAX_LAYERS] for i in range(MAX_LAYERS)]
        few = {layer: shares[layer] for layer in (layers if len(layers) <= MAX_LAYERS else chosen)}
        caption = (
            "Each expert's share of its layer's rows between two logs; the white line on the scale "
            f"is an even share. {len(few)} of {len(layers)} layers."
        )
        figure = pictures.shares_figure(few)
        drawn.append(("Tokens per expert", caption, "experts.png", figure))
    if len(run.series("iteration-time")) > 1:
        caption = "Seconds per iteration; the first log has what a start costs and is left out."
        drawn.append(("Speed", caption, "speed.png", pictures.speed_figure(run)))
    return drawn


def _last(run: Run, tag: str) -> float | None:
    series = run.series(tag)
    return _number(series[-1][1]) if series else None


def _number(value: float | None) -> float | None:
    """Return a value that JSON has."""
    return value if value is not None and math.isfinite(value) else None
