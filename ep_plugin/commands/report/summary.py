"""The figures of a quickstart run, from what its steps left behind."""

import math
import re
from pathlib import Path
from typing import Any

from ep_plugin.errors import ConfigError
from ep_plugin.untrusted import cut, read_json, read_text, shown

GIB = 1 << 30
MOST_OF_A_LOG = 256 << 20
FINISHED = "use a folder that recipes/quickstart.sh finished"
VALIDATION = re.compile(r"on validation set \| lm loss value: (-?[\d.]+(?:[Ee][+-]?\d+)?)(?!\S)")
# Evaluations of the same validation samples; Megatron writes them to its log alone.
EVALUATIONS = {
    "dense_final_val_loss": "evaluate-dense",
    "moe_initial_val_loss": "evaluate-converted",
    "moe_final_val_loss": "evaluate-moe",
}


def logged_validation_loss(log: Path) -> float:
    """Return the last validation loss in Megatron's `log`; raises ConfigError without one."""
    found = VALIDATION.findall(read_text(log, FINISHED, MOST_OF_A_LOG)) if log.is_file() else []
    try:
        loss = float(found[-1])
        if not math.isfinite(loss):
            raise ValueError
        return loss
    except (IndexError, ValueError) as error:
        raise ConfigError(
            f"--run must hold the log of an evaluation; {cut(str(log))} has no validation loss; "
            f"{FINISHED}"
        ) from error


def measured(folder: Path) -> dict[str, Any]:
    """Return the measured part of summary.json for a quickstart's `folder`.

    Losses in nats per token; `peak_rss_gib` is the largest sum over all processes of a step.
    """
    usages = sorted(folder.glob("logs/*.usage.json"))
    if not usages:
        raise ConfigError(f"{cut(str(folder))} has no logs/*.usage.json; {FINISHED}")
    losses = {
        name: logged_validation_loss(folder / "logs" / f"{step}.log")
        for name, step in EVALUATIONS.items()
    }
    return {
        **losses,
        "parity_max_abs_diff": _figure(folder / "converted" / "parity.json", "logits_max_abs_diff"),
        "peak_rss_gib": round(max(_figure(path, "peak_rss_bytes") for path in usages) / GIB, 2),
        "seconds": round(sum(_figure(path, "seconds") for path in usages), 1),
    }


def _figure(path: Path, name: str) -> float:
    """Return a number of a JSON file; raises ConfigError where it has none of that name."""
    value = read_json(path, FINISHED).get(name)
    if type(value) not in (int, float):
        raise ConfigError(f"{cut(str(path))} has no number {name}, but {shown(value)}; {FINISHED}")
    return float(value)
