"""Time on one device: variants in turn, buffers rotated, medians.

Every round runs every variant once, so that a drift of the clock meets all alike. On CUDA a step is
between two events with the device idle before it, so time the host takes to launch counts, unless
the protocol says otherwise; on the CPU it is wall time.
"""

import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from ep_plugin.commands.bench.case import SETS
from ep_plugin.commands.bench.floors import H100, Rates

Step = Callable[[int], object]  # is given the index of its set of buffers
BUSY_CYCLES = 2_000_000  # about a millisecond
LARGE = 8192  # each side of a product that tells a rate
STATE = {"sm_mhz": "clocks.sm", "watt": "power.draw", "celsius": "temperature.gpu"}


@dataclass(frozen=True)
class Timing:
    """Milliseconds."""

    median: float
    p10: float
    p90: float
    host: float | None = None  # median until a call returned, all of it launched; on GPUs


class Taken(NamedTuple):
    """Milliseconds of one call."""

    whole: float
    host: float | None  # until it returned, with work left for the GPU; None on the CPU


@dataclass(frozen=True)
class Protocol:
    """How often each variant runs, and on what."""

    device: torch.device
    warm: int = 20
    repeats: int = 100
    hide_launch: bool = False  # kernels alone: keep the GPU busy while the host launches them
    align: Callable[[], object] | None = None  # ranks start each step together

    def interleave(
        self, steps: Mapping[str, Step], title: str = ""
    ) -> tuple[dict[str, Timing], dict[str, float]]:
        """Return each step's timing, and the GPU's state meanwhile (empty where unknown)."""
        seen: dict[str, list[Taken]] = {name: [] for name in steps}
        states: list[dict[str, float]] = []
        for turn in tqdm(range(self.warm + self.repeats), desc=title, leave=False, disable=None):
            for name, step in steps.items():
                taken = self.once(step, turn % SETS)
                if turn >= self.warm:
                    seen[name].append(taken)
            if turn >= self.warm and (turn - self.warm) % 25 == 0:
                states.append(gpu_state(self.device))
        times = {name: timing(values) for name, values in seen.items()}
        known = [state for state in states if state]
        return times, {k: statistics.median(s[k] for s in known) for k in STATE if known}

    def once(self, step: Step, index: int) -> Taken:
        """Return the milliseconds of one call."""
        if self.align is not None:
            self.align()
        if self.device.type != "cuda":
            began = time.perf_counter()
            step(index)
            return Taken(1e3 * (time.perf_counter() - began), None)
        start, end = (_event() for _ in range(2))
        torch.cuda.synchronize()
        if self.hide_launch:
            torch.cuda._sleep(BUSY_CYCLES)  # type: ignore[no-untyped-call]
        start.record()
        began = time.perf_counter()
        step(index)
        host = 1e3 * (time.perf_counter() - began)
        end.record()
        torch.cuda.synchronize()
        return Taken(float(start.elapsed_time(end)), host)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def default_device() -> torch.device:
    """Return the current GPU, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def timing(calls: list[Taken]) -> Timing:
    """Return median and deciles of `calls`."""
    ordered = sorted(call.whole for call in calls)
    hosts = [call.host for call in calls if call.host is not None]
    last = len(ordered) - 1
    return Timing(
        *(statistics.median(ordered), ordered[round(0.1 * last)], ordered[round(0.9 * last)]),
        statistics.median(hosts) if hosts else None,
    )


@cache
def _capture_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]


@contextmanager
def to_capture(will_be: bool = True) -> Iterator[None]:
    """Run what is inside on the stream that `captured` captures, if it will be captured.

    A step that will be captured runs there from its first time on: autograd keeps the stream of a
    leaf's first use for as long as anything holds that use's graph, as Megatron's layer does, and
    the default stream cannot be captured.
    """
    if not will_be:
        yield
        return
    stream = _capture_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def captured(step: Step, pool: Any) -> Step:
    """Return `step` as CUDA graphs, one for each set of buffers.

    Nothing of a step is read after it, so all graphs of a run can share the memory of `pool`.
    """
    with to_capture():
        for index in range(SETS):
            step(index)
    graphs: list[torch.cuda.CUDAGraph] = []
    for index in range(SETS):
        graph = torch.cuda.CUDAGraph()
        where: dict[str, Any] = {"pool": pool, "stream": _capture_stream()}
        with torch.cuda.graph(graph, **where, capture_error_mode="thread_local"):
            step(index)
        graphs.append(graph)
    return lambda index: graphs[index].replay()


def copy_bandwidth(protocol: Protocol) -> float:
    """Return bytes per second of torch's copy of a large buffer, read and written both counted."""
    size = 2**30 if protocol.device.type == "cuda" else 2**24
    source = torch.zeros(size, dtype=torch.uint8, device=protocol.device)
    target = torch.empty_like(source)
    times, _ = protocol.interleave({"copy": lambda _: target.copy_(source)}, "copy")
    return 2e3 * size / times["copy"].median


def rates(protocol: Protocol) -> Rates:
    """Return what this GPU reaches: a copy, and large products of random numbers in turn.

    Without a GPU, what is assumed of one H100: a CPU's rates say nothing about a layer's floor.
    """
    if protocol.device.type != "cuda":
        return H100
    kernels = replace(protocol, hide_launch=True, align=None)
    left, right = (
        torch.randn(LARGE, LARGE, dtype=torch.bfloat16, device=protocol.device) for _ in range(2)
    )
    steps: dict[str, Step] = {"bf16": lambda _: left @ right.T}
    if torch.cuda.get_device_capability(protocol.device) >= (8, 9):
        narrow = [matrix.to(torch.float8_e4m3fn) for matrix in (left, right)]
        one = torch.ones((), device=protocol.device)
        options: dict[str, Any] = {"out_dtype": torch.bfloat16, "use_fast_accum": True}
        steps["fp8"] = lambda _: torch._scaled_mm(narrow[0], narrow[1].T, one, one, **options)
    times, _ = kernels.interleave(steps, "rates")
    found = {name: 2e3 * LARGE**3 / time.median for name, time in times.items()}
    name = torch.cuda.get_device_name(protocol.device)
    # A GPU without e4m3 products has none of its rows in FP8 either.
    fp8 = found.get("fp8", found["bf16"])
    return Rates(copy_bandwidth(kernels), found["bf16"], fp8, f"measured on {name}")


def gpu_state(device: torch.device) -> dict[str, float]:
    """Return clock, power and temperature as nvidia-smi reads them; empty without it."""
    if device.type != "cuda" or shutil.which("nvidia-smi") is None:
        return {}
    identity = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    query = f"--query-gpu={','.join(STATE.values())}"
    said = subprocess.run(
        ["nvidia-smi", "-i", identity, query, "--format=csv,noheader,nounits"],
        capture_output=True,
        text=True,
    )
    fields = said.stdout.strip().split(", ")
    if not all(re.fullmatch(r"\d+(\.\d+)?", field) for field in fields):
        return {}  # no such GPU, or a reading it does not have
    return dict(zip(STATE, map(float, fields), strict=True))
