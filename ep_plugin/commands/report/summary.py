"""The figures of a quickstart run, from what its steps left behind."""

import json
import re
from pathlib import Path
from typing import Any

from ep_plugin.errors import ConfigError

GIB = 1 << 30
VALIDATION = re.compile(r"on validation set \| lm loss value: (\S+)")
# Evaluations of the same validation samples; Megatron writes them to its log alone.
EVALUATIONS = {
    "dense_final_val_loss": "evaluate-dense",
    "moe_initial_val_loss": "evaluate-converted",
    "moe_final_val_loss": "evaluate-moe",
}


def logged_validation_loss(log: Path) -> float:
    """Return the last validation loss in Megatron's `log`; raises ConfigError without one."""
    found = VALIDATION.findall(log.read_text()) if log.is_file() else []
    if not found:
        raise ConfigError(
            f"--run must hold the log of an evaluation; {str(log)!r} has no validation loss; use "
            "a folder that recipes/quickstart.sh finished"
        )
    return float(found[-1])


def measured(folder: Path) -> dict[str, Any]:
    """Return the measured part of summary.json for a quickstart's `folder`.

    Losses in nats per token; `peak_rss_gib` is the largest sum over all processes of a step.
    """
    usages = [json.loads(path.read_text()) for path in sorted(folder.glob("logs/*.usage.json"))]
    losses = {
        name: logged_validation_loss(folder / "logs" / f"{step}.log")
        for name, step in EVALUATIONS.items()
    }
    parity = json.loads((folder / "converted" / "parity.json").read_text())
    return {
        **losses,
        "parity_max_abs_diff": parity["logits_max_abs_diff"],
        "peak_rss_gib": round(max(usage["peak_rss_bytes"] for usage in usages) / GIB, 2),
        "seconds": round(sum(usage["seconds"] for usage in usages), 1),
    }
