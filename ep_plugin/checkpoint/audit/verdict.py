"""What an audit found, for people and for scripts."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ep_plugin.checkpoint.moe_layers import hybrid_symbol
from ep_plugin.untrusted import shown

Check = Literal["files", "coverage", "values", "dtype", "shape", "experts", "optimizer"]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong (`error`), or that a user may want to know (`warning`)."""

    level: Literal["error", "warning"]
    check: Check
    where: str  # the stored name, or the block
    message: str


@dataclass(frozen=True)
class AuditedLayer:
    """The experts of one Mixture-of-Experts block."""

    block: str  # "decoder.layers.3.mlp"
    experts: int  # how many are whole
    expected: int
    distinct: int  # how many differ from every other one
    dtype: str
    shapes: str  # of one expert's fc1 and fc2
    moments: str  # states that every expert has, or "-"


@dataclass(frozen=True)
class Report:
    """The audit of one checkpoint."""

    checkpoint: str
    iteration: int | None
    num_tensors: int
    num_bytes: int
    layers: list[AuditedLayer]
    optimizer: str
    findings: list[Finding]
    without_checksums: int = 0  # tensors and objects
    pattern: str | None = None  # of a HybridModel

    @property
    def errors(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.level == "error"]

    @property
    def passed(self) -> bool:
        return not self.errors

    def as_dict(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        return {"passed": self.passed, **asdict(self)}

    def summary(self) -> str:
        """Return the audit in one line."""
        verdict = "fine" if self.passed else f"{len(self.errors)} errors"
        if self.without_checksums:
            verdict += (
                f"; {self.without_checksums} tensors and objects were saved without checksums, so "
                "bytes that were altered since are not noticed in them"
            )
        layers = f"{len(self.layers)} MoE layers"
        if self.pattern is not None:
            layers += f" of {shown(self.pattern)}"
        return (
            f"{self.checkpoint}: {self.num_tensors} tensors, {self.num_bytes / 2**20:.1f} MiB, "
            f"{layers}, optimizer {self.optimizer}: {verdict}"
        )

    def table(self) -> str:
        """Return the audit as a table of layers, then one line for each finding."""
        head = ["block", "experts", "distinct", "dtype", "fc1, fc2", "moments"]
        if self.pattern is not None:
            head.append("symbol of the pattern")
        rows: list[Sequence[str]] = [head]
        for layer in self.layers:
            found = f"{layer.experts} of {layer.expected}"
            rows.append(
                (layer.block, found, str(layer.distinct), layer.dtype, layer.shapes, layer.moments)
            )
            if self.pattern is not None:
                rows[-1] = (*rows[-1], _symbol(layer.block, self.pattern))
        widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in (rows if self.layers else [])
        ]
        lines += [
            f"{f.level}: {f.where}{': ' if f.where else ''}{f.message}" for f in self.findings
        ]
        return "\n".join([*lines, self.summary()])


def _symbol(block: str, pattern: str) -> str:
    """Return a block's number in the pattern, from 1 as in metrics, and its symbol there."""
    number = block.removeprefix("decoder.layers.").partition(".")[0]
    if not number.isdecimal():
        return "-"
    return f"{int(number) + 1}: {hybrid_symbol(pattern, int(number)) or 'none'}"
