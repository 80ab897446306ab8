"""How much of the time on the wire this rank computes meanwhile, as its GPU's kernels show it.

What `hidden_share` counts as lost, because a product in two parts takes longer than in one, is not
counted here: the two together tell whether exchanges are hidden, and what that costs.
"""

from collections.abc import Iterable
from typing import NamedTuple

from torch.profiler import ProfilerActivity, profile

from ep_plugin.commands.bench.case import SETS
from ep_plugin.commands.bench.measure import Protocol, Step

WIRE_KERNELS = (  # NCCL's, those of symm_mem, the copy engines', DeepEP's
    *("SendRecv", "_push_kernel", "_sum_home_kernel", "Memcpy PtoP"),
    *("intranode::dispatch", "intranode::combine"),
)
WAITING = ("barrier", "nccl", "intranode::")  # for other ranks


class Span(NamedTuple):
    """A kernel or a copy, in microseconds."""

    name: str
    start: float
    end: float

    @property
    def is_wire(self) -> bool:
        return any(name in self.name for name in WIRE_KERNELS)

    @property
    def is_work(self) -> bool:
        return not self.is_wire and not any(name in self.name for name in WAITING)


def spans_of(step: Step, protocol: Protocol) -> list[Span]:
    """Return the kernels of a step with each set of buffers. All ranks must call it."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for index in range(SETS):
            protocol.once(step, index)
    return [
        Span(event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type.name == "CUDA"
    ]


def covered_share(spans: Iterable[Span]) -> float | None:
    """Return the share of the time on the wire beside work; None where nothing is on the wire."""
    spans = sorted(spans, key=lambda span: span.start)
    work: list[tuple[float, float]] = []  # apart from each other
    for span in spans:
        if span.is_work and work and span.start <= work[-1][1]:
            work[-1] = work[-1][0], max(work[-1][1], span.end)
        elif span.is_work:
            work.append((span.start, span.end))
    wire = [span for span in spans if span.is_wire]
    total = sum(span.end - span.start for span in wire)
    beside = sum(
        max(0.0, min(end, span.end) - max(start, span.start))
        for span in wire
        for start, end in work
    )
    return beside / total if total else None
