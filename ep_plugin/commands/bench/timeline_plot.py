"""A timeline as a picture: what is computed above, what travels below, on one axis of time.

On a GPU it shows what the kernels do; on the CPU the ranges of the verbs, and the axis is the share
of a step: the machine's own milliseconds say nothing.
"""

from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ep_plugin.commands.bench.covered import Span
from ep_plugin.commands.bench.timeline import NETWORK

COLORS = {  # by how a range's name begins, the first that fits
    "dispatcher swap, wait": ("waiting for tokens", "#d1d5db"),
    "dispatcher": ("packing, sending, summing", "#ca8a04"),
    "router": ("router", "#6d28d9"),
    "experts": ("experts", "#0f766e"),
    NETWORK: ("exchange under way", "#1d4ed8"),
}
ON_GPU = {
    "work": ("routing, experts, moving rows here", "#0f766e"),
    "wait": ("waiting for the other ranks", "#d1d5db"),
    NETWORK: ("rows between GPUs", "#1d4ed8"),
}
KERNELS = ("kernel", "gpu_memcpy", "gpu_memset")
Bar = tuple[float, float, str]  # begin and length on the axis, key of the colors


def draw(timeline: dict[str, Any]) -> Figure:
    """Return the picture of the last step of `timeline`, as `timeline.record` made it."""
    matplotlib.rcParams.update({"font.size": 9, "legend.frameon": False})
    events = [event for event in timeline["traceEvents"] if event.get("ph") == "X"]
    kernels = [event for event in events if event.get("cat") in KERNELS]
    steps = [e for e in events if e["name"].startswith("step ") and e["cat"] == "user_annotation"]
    step = max(steps, key=lambda e: float(e["ts"]))
    begin, end, colors = step["ts"], step["ts"] + step["dur"], COLORS
    if kernels:  # the host may be done long before they are
        events, colors = [event for event in kernels if event["ts"] >= begin], ON_GPU
        begin, end = (min(e["ts"] for e in events), max(e["ts"] + e["dur"] for e in events))
    scale = 1e-3 if kernels else 100 / (end - begin)  # of microseconds
    inside = [e for e in events if begin <= e["ts"] and e["ts"] + e["dur"] <= end]
    lanes: dict[str, list[Bar]] = {}
    for event in inside:
        key = _kind(event) if kernels else _key(event)
        if key is not None:
            bar = ((event["ts"] - begin) * scale, event["dur"] * scale, key)
            lane = key if kernels else _lane(event)
            lanes.setdefault(lane, []).append(bar)
    figure = Figure(figsize=(11, 1.3 + 0.4 * len(lanes)), layout="constrained")
    axes = figure.subplots()
    names = list(ON_GPU) if kernels else sorted(lanes, key=lambda n: (n.startswith(NETWORK), n))
    for height, name in enumerate(names):
        for start, length, key in lanes.get(name, []):
            axes.broken_barh([(start, length)], (-height - 0.4, 0.8), color=colors[key][1])
    axes.set_yticks([-height for height in range(len(names))], names)
    unit = "milliseconds" if kernels else "percent"
    axes.set_xlabel(f"{unit} of one step, forward and backward")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(
        handles=[Patch(color=color, label=label) for label, color in colors.values()],
        loc="outside upper center",
        ncols=len(colors),
    )
    return figure


def _kind(event: dict[str, Any]) -> str:
    """Return which of ON_GPU a kernel is."""
    span = Span(event["name"], event["ts"], event["ts"] + event["dur"])
    return NETWORK if span.is_wire else "work" if span.is_work else "wait"


def _key(event: dict[str, Any]) -> str | None:
    """Return which of COLORS the event is, None for those that are not drawn."""
    if str(event["tid"]).startswith(NETWORK):
        return NETWORK
    return next((key for key in COLORS if event["name"].startswith(key)), None)


def _lane(event: dict[str, Any]) -> str:
    track = str(event["tid"])
    if track.startswith(NETWORK):
        return track
    return "thread of rank 0"
