"""Reading Megatron's TensorBoard folders."""

import re
from dataclasses import dataclass
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ep_plugin.errors import ConfigError

TRAIN, VALIDATION = "lm loss", "lm loss validation"
BALANCE = "load_balancing_loss"
SHARE = re.compile(r"ep/tokens_per_expert/layer_(\d+)/expert_(\d+)")

Series = list[tuple[int, float]]  # (iteration, value), sorted


@dataclass(frozen=True)
class Run:
    """The scalars of one TensorBoard folder, by tag."""

    scalars: dict[str, Series]

    def series(self, tag: str) -> Series:
        """Return the values of `tag`, empty when the run has none."""
        return self.scalars.get(tag, [])

    def shares(self) -> dict[int, dict[int, Series]]:
        """Return layer -> expert -> share of the layer's rows (0..1) over the iterations."""
        found: dict[int, dict[int, Series]] = {}
        for tag, series in self.scalars.items():
            match = SHARE.fullmatch(tag)
            if match:
                found.setdefault(int(match[1]), {})[int(match[2])] = series
        return {layer: dict(sorted(experts.items())) for layer, experts in sorted(found.items())}


def read_events(folder: Path) -> dict[str, dict[int, float]]:
    """Return tag -> iteration -> value of every event file of `folder`.

    Where a resumed run wrote an iteration again, the later file counts. Within a file the first
    value does: Megatron ends with the loss of the test set under the tag of the validation set.
    """
    latest: dict[str, dict[int, float]] = {}
    for path in sorted(folder.glob("*tfevents*")):  # the name begins with the time
        events = EventAccumulator(str(path), size_guidance={"scalars": 0})
        events.Reload()
        for tag in events.Tags()["scalars"]:
            values = {event.step: event.value for event in reversed(events.Scalars(tag))}
            before = latest.get(tag, {}).items()
            latest[tag] = {i: v for i, v in before if i < min(values)} | values
    return latest


def read_run(folder: Path) -> Run:
    """Read every event file of `folder`; raises ConfigError without a training loss."""
    latest = read_events(folder)
    if TRAIN not in latest:
        raise ConfigError(
            f"a run must have logged {TRAIN!r} to TensorBoard; {str(folder)!r} holds "
            f"{sorted(latest)}; use a run longer than its --log-interval"
        )
    return Run({tag: sorted(values.items()) for tag, values in latest.items()})
