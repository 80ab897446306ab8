"""The share of the wire's time beside work, from kernels as a profiler gives them."""

import pytest

from ep_plugin.commands.bench.covered import Span, covered_share

COPY, NCCL, GEMM, BARRIER = (
    "Memcpy PtoP (Device -> Device)",
    "ncclDevKernel_SendRecv",
    "gemm",
    "barrier_kernel",
)
DEEPEP, NOTIFY = (f"void deep_ep::intranode::{name}<2>" for name in ("dispatch", "notify_dispatch"))


@pytest.mark.parametrize(
    ("spans", "share"),
    [
        ([(GEMM, 0, 10)], None),
        ([(COPY, 0, 10), (GEMM, 10, 20)], 0.0),
        ([(COPY, 0, 10), (GEMM, 0, 20)], 1.0),
        ([(COPY, 0, 10), (GEMM, 4, 6), (GEMM, 5, 8), (GEMM, 5, 6)], 0.4),  # counted once
        ([(COPY, 0, 10), (NCCL, 20, 30), (GEMM, 5, 25)], 0.5),
        ([(DEEPEP, 0, 10), (GEMM, 5, 15), (NOTIFY, 0, 10)], 0.5),
        ([(COPY, 0, 10), (BARRIER, 0, 10), ("ncclDevKernel_AllGather", 0, 10)], 0.0),
    ],
)
def test_share_of_the_wire_beside_work(
    spans: list[tuple[str, float, float]], share: float | None
) -> None:
    for order in (spans, spans[::-1]):
        assert covered_share(Span(*span) for span in order) == pytest.approx(share)
