"""A timeline of the layer in chunks, as rank 0 sees it, for Perfetto or Chrome.

Ranges carry the names of the verbs: what the dispatcher packs, sends and waits for, and which step
of the experts' recipe runs meanwhile. On a GPU the profiler also draws them on the streams, beside
the kernels of each. On the CPU exchanges get tracks of their own: gloo's are under way while the
thread that started them goes on, and a track can only show ranges that lie inside each other.
"""

import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

from ep_plugin.moe.interfaces import Pending
from ep_plugin.moe.layer import MoELayer

STEPS = 2
NETWORK = "network"


class Named:
    """An object whose methods leave a range each, `prefix method`, in a timeline."""

    def __init__(self, target: Any, prefix: str) -> None:
        self._target, self._prefix = target, prefix

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._target, name)
        return _named(value, f"{self._prefix} {name}") if callable(value) else value


def _named(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with record_function(name):
            result = function(*args, **kwargs)
        if isinstance(result, Pending):
            return replace(result, wait=_named(result.wait, f"{name}, wait"))
        return result

    return call


def mark(layer: MoELayer) -> None:
    """Let the verbs of `layer` leave ranges from now on."""
    recipes = layer.experts.recipes

    def named_recipes(num_rows: int) -> Callable[..., Any]:
        make = recipes(num_rows)
        return lambda rows: Named(make(rows), "experts")

    layer.dispatcher = Named(layer.dispatcher, "dispatcher")
    layer.experts.recipes = named_recipes  # type: ignore[method-assign]
    layer.router.forward = _named(layer.router.forward, "router")  # type: ignore[attr-defined]


def record(step: Callable[[int], object], device: torch.device) -> dict[str, Any]:
    """Return a timeline, in the trace event format, of `step` called with 0 and 1.

    As many calls go before it, to warm up. All ranks must call it; each sees its own.
    """
    for index in range(STEPS):
        step(index)
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        for index in range(STEPS):
            dist.barrier()
            _wait_for(device)
            with record_function(f"step {index}"):
                step(index)
            _wait_for(device)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "timeline.json")
        profiler.export_chrome_trace(str(file))
        timeline: dict[str, Any] = json.loads(file.read_text())
    timeline["traceEvents"] += _own_tracks(timeline["traceEvents"])
    return timeline


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _own_tracks(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Move gloo's exchanges to tracks on which none overlap; returns the names of the tracks."""
    exchanges = [e for e in events if e.get("ph") == "X" and e["name"].startswith("gloo:")]
    ends: list[float] = []  # of the last range of each track
    for event in sorted(exchanges, key=lambda e: float(e["ts"])):
        begin, end = event["ts"], event["ts"] + event["dur"]
        track = next((i for i, last in enumerate(ends) if last <= begin), len(ends))
        ends[track:] = [end, *ends[track + 1 :]]
        event["tid"] = f"{NETWORK} {track}"
    pid = exchanges[0]["pid"] if exchanges else 0
    return [
        {
            **{"ph": "M", "name": "thread_name", "pid": pid, "tid": f"{NETWORK} {track}"},
            "args": {"name": f"{NETWORK} {track}"},
        }
        for track in range(len(ends))
    ]
