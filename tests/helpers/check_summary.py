"""Check a quickstart's summary: python tests/helpers/check_summary.py RUN/summary.json"""

import json
import sys
from pathlib import Path
from typing import Any

KEYS = {
    "dense_final_val_loss",
    "moe_initial_val_loss",
    "moe_final_val_loss",
    "parity_max_abs_diff",
    "experts",
    "topk",
    "ep",
    "ranks",
    "device",
    "seconds",
    "peak_rss_gib",
    "resumed_at_iteration",
}


def problems(summary: dict[str, Any]) -> list[str]:
    """Return one sentence for each thing a summary must not be."""
    if set(summary) != KEYS:
        return [f"keys differ from what is documented: {sorted(set(summary) ^ KEYS)}"]
    jump = abs(summary["moe_initial_val_loss"] - summary["dense_final_val_loss"])
    found = {
        f"the converted model's loss is {jump:.1e} away from the dense model's": jump > 1e-3,
        "training after the conversion did not lower the loss": (
            summary["moe_final_val_loss"] >= summary["dense_final_val_loss"]
        ),
        "logits differ by more than 1e-4": summary["parity_max_abs_diff"] > 1e-4,
        "the ranks used 6 GiB or more": summary["peak_rss_gib"] >= 6,
    }
    return [sentence for sentence, wrong in found.items() if wrong]


if __name__ == "__main__":
    wrong = problems(json.loads(Path(sys.argv[1]).read_text()))
    print("summary: " + ("; ".join(wrong) or "as it should be"))
    sys.exit(bool(wrong))
