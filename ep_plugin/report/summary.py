"""The figures of a quickstart run, from what its steps left behind."""

import json
from pathlib import Path
from typing import Any

from ep_plugin.config import ConfigError
from ep_plugin.report.events import VALIDATION, Run

GIB = 1 << 30


def last_value(run: Run, tag: str, name: str) -> float:
    """Return the last value of `tag`; raises ConfigError when run `name` has none."""
    series = run.series(tag)
    if not series:
        raise ConfigError(f"run {name!r} must have validated at least once; it has no {tag!r}")
    return series[-1][1]


def measured(folder: Path, runs: dict[str, Run]) -> dict[str, Any]:
    """Return the measured part of summary.json for a quickstart's `folder`.

    Losses in nats per token; `peak_rss_gib` is the largest sum over all processes of a step.
    """
    usages = [json.loads(path.read_text()) for path in sorted(folder.glob("logs/*.usage.json"))]
    parity = json.loads(next(folder.glob("converted/**/parity.json")).read_text())
    return {
        "dense_final_val_loss": last_value(runs["evaluate-dense"], VALIDATION, "evaluate-dense"),
        "moe_initial_val_loss": last_value(
            runs["evaluate-converted"], VALIDATION, "evaluate-converted"
        ),
        "moe_final_val_loss": last_value(runs["moe"], VALIDATION, "moe"),
        "parity_max_abs_diff": parity["logits_max_abs_diff"],
        "peak_rss_gib": round(max(usage["peak_rss_bytes"] for usage in usages) / GIB, 2),
        "seconds": round(sum(usage["seconds"] for usage in usages), 1),
    }
