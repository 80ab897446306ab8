"""A timeline as a picture: what is computed above, what travels below, on one axis of time.

On the CPU the axis is the share of a step: the machine's own milliseconds say nothing.
"""

from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ep_plugin.bench.timeline import NETWORK

COLORS = {  # by how a range's name begins, the first that fits
    "dispatcher swap, wait": ("waiting for tokens", "#d1d5db"),
    "dispatcher": ("packing, sending, summing", "#ca8a04"),
    "router": ("router", "#6d28d9"),
    "experts": ("experts", "#0f766e"),
    NETWORK: ("exchange under way", "#1d4ed8"),
}
Bar = tuple[float, float, str]  # begin and length on the axis, key of COLORS


def draw(timeline: dict[str, Any]) -> Figure:
    """Return the picture of the last step of `timeline`, as `timeline.record` made it."""
    matplotlib.rcParams.update({"font.size": 9, "legend.frameon": False})
    events = [event for event in timeline["traceEvents"] if event.get("ph") == "X"]
    on_gpu = [event for event in events if event.get("cat") in ("gpu_user_annotation", "kernel")]
    events = on_gpu or events
    begin, end = _span(events, bool(on_gpu))
    scale = 1e-3 if on_gpu else 100 / (end - begin)  # of microseconds
    inside = [e for e in events if begin <= e["ts"] and e["ts"] + e["dur"] <= end]
    lanes: dict[str, list[Bar]] = {}
    for event in inside:
        key = _key(event)
        if key is not None:
            bar = ((event["ts"] - begin) * scale, event["dur"] * scale, key)
            lanes.setdefault(_lane(event), []).append(bar)
    figure = Figure(figsize=(11, 1.3 + 0.4 * len(lanes)), layout="constrained")
    axes = figure.subplots()
    names = sorted(lanes, key=lambda name: (name.startswith(NETWORK), name))
    for height, name in enumerate(names):
        for start, length, key in lanes[name]:
            axes.broken_barh([(start, length)], (-height - 0.4, 0.8), color=COLORS[key][1])
    axes.set_yticks([-height for height in range(len(names))], names)
    unit = "milliseconds" if on_gpu else "percent"
    axes.set_xlabel(f"{unit} of one step, forward and backward")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(
        handles=[Patch(color=color, label=label) for label, color in COLORS.values()],
        loc="outside upper center",
        ncols=len(COLORS),
    )
    return figure


def _span(events: list[dict[str, Any]], on_gpu: bool) -> tuple[float, float]:
    """Return where the last step begins and ends, in microseconds.

    On a GPU the range of a step ends with its forward, since the backward is another thread's, and
    begins late: a step lasts from its router to the last of all.
    """
    name = "router" if on_gpu else "step "
    begins = [event for event in events if event["name"].startswith(name)]
    first = max(begins, key=lambda event: float(event["ts"]))
    last = max(events, key=lambda event: float(event["ts"]) + event["dur"]) if on_gpu else first
    return first["ts"], last["ts"] + last["dur"]


def _key(event: dict[str, Any]) -> str | None:
    """Return which of COLORS the event is, None for those that are not drawn."""
    if str(event["tid"]).startswith(NETWORK) or event["name"].startswith("nccl"):
        return NETWORK
    return next((key for key in COLORS if event["name"].startswith(key)), None)


def _lane(event: dict[str, Any]) -> str:
    track = str(event["tid"])
    if track.startswith(NETWORK):
        return track
    return f"stream {track}" if event.get("cat") != "user_annotation" else "thread of rank 0"
