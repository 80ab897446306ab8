"""What was compared, as text."""

from typing import Any

from ep_plugin.commands.parity.differences import Comparison


def table(comparisons: list[Comparison]) -> str:
    """Return a row for each layout: its largest differences, and the first that is too large."""
    kinds: dict[str, Any] = {}
    for comparison in comparisons:
        row = {"layout": comparison.layout, "ranks": str(comparison.ranks)}
        for difference in comparison.scalars:
            row[difference.name] = _larger(row.get(difference.name), difference.relative)
        for title, differences in (
            ("gradients", comparison.gradients),
            ("resumed", comparison.resumed),
        ):
            for difference in differences:
                row[title] = _larger(row.get(title), difference.relative)
        row[""] = "passed" if comparison.passed else "DIFFERS"
        if comparison.failure is not None:
            row[""] = "DID NOT FINISH"
        kinds[comparison.layout] = row
    head = list(dict.fromkeys(title for row in kinds.values() for title in row if title))
    rows = [
        [*head, ""],
        *([row.get(title, "-") for title in [*head, ""]] for row in kinds.values()),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head) + 1)]
    lines = ["largest relative differences from one rank:"]
    lines += [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    lines += [
        f"{comparison.layout}: the first that differs is {comparison.first.text}"
        for comparison in comparisons
        if comparison.first is not None
    ]
    lines += [comparison.failure for comparison in comparisons if comparison.failure is not None]
    return "\n".join(lines)


def _larger(shown: str | None, relative: float) -> str:
    largest = relative if shown is None else max(float(shown), relative)
    return f"{largest:.1e}"
