"""What `ep-plugin plan` foresees of the layer over ranks, beside every row that was measured.

python benchmarks/forecast_errors.py [ROWS.json ...]      (default: all of benchmarks/results)

Of each way: exchanges as measured over those foreseen, and steps, whose compute is that of the row.
"""

import json
import statistics
import sys
from pathlib import Path

from ep_plugin.commands.bench.figures import Row, read
from ep_plugin.commands.bench.shapes import SHAPES
from ep_plugin.commands.plan import sent_as
from ep_plugin.commands.plan.network import NETWORKS, Traffic, forecast

RESULTS = Path(__file__).parent / "results"
CHUNKS = 2  # of the schedule `chunked`, of other ranks' tokens at most; its own are another


def ratios(row: Row) -> tuple[float, float] | None:
    """Return exchange and step, measured over foreseen; None for a row that is not foreseen."""
    how = sent_as(row) if row["bench"] == "overlap" and row["exchange_ms"] is not None else None
    if how is None or row["device"] == "cpu" or row["dims"] is None:
        return None
    eight = row["dispatcher"].endswith("fp8")
    sizes = row["dims"]["tokens"], row["dims"]["topk"], row["dims"]["hidden"]
    experts = SHAPES[row["shape"]].experts * row["ep"]
    traffic = Traffic(*sizes, experts, dispatch_bytes=1.0 if eight else 2.0)
    chunks = 1 + min(CHUNKS, row["ep"] - 1) if row["schedule"] == "chunked" else 1
    foreseen = forecast(traffic, NETWORKS["nvlink8"], row["ep"], how, row["compute_ms"], chunks)
    return row["exchange_ms"] / foreseen.exchange_ms, row["ms"] / foreseen.step_ms


def table(paths: list[Path] | None = None) -> str:
    """Return the errors of each way as a table."""
    groups: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    for path in paths or [path for path in sorted(RESULTS.glob("*.json")) if _is_of_ranks(path)]:
        for row in read(path):
            found = ratios(row)
            if found is not None:
                launched = "graph" if row["graph"] else "the host"
                way = f"{row['dispatcher']}, {row['schedule']}"
                groups.setdefault((f"EP {row['ep']}", launched, way), []).append(found)
    lines = ["| ranks | launched by | way | rows | exchange | step |", "|" + "---|" * 6]
    for key, values in sorted(groups.items()):
        exchange, step = (_shown([v[i] for v in values]) for i in range(2))
        lines.append(f"| {' | '.join(key)} | {len(values)} | {exchange} | {step} |")
    return "\n".join(lines)


def _is_of_ranks(path: Path) -> bool:
    rows = json.loads(path.read_text())
    return isinstance(rows, list) and any(row.get("bench") == "overlap" for row in rows)


def _shown(values: list[float]) -> str:
    """Return the median, and least and most."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    print(table([Path(name) for name in sys.argv[1:]]))
