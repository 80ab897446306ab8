"""Reading Megatron's TensorBoard folders."""

import re
from dataclasses import dataclass
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ep_plugin.errors import ConfigError
from ep_plugin.untrusted import check_regular, cut

TRAIN, VALIDATION = "lm loss", "lm loss validation"
BALANCE = "load_balancing_loss"
REMEDY = "use a run's own TensorBoard folder, or take the file out"
SHARE = re.compile(r"ep/tokens_per_expert/layer_(\d{1,5})/expert_(\d{1,6})")
MOST_BYTES = 2 << 30  # of an event file, which is read whole

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
        events = _read(path)
        for tag in events.Tags()["scalars"]:
            values = {event.step: event.value for event in reversed(events.Scalars(tag))}
            before = latest.get(tag, {}).items()
            latest[tag] = {i: v for i, v in before if i < min(values)} | values
    return latest


def _read(path: Path) -> EventAccumulator:
    """Return the events of a file; raises ConfigError for one that TensorBoard cannot read."""
    try:
        if check_regular(path, REMEDY).st_size > MOST_BYTES:
            raise ConfigError(f"{cut(str(path))} has more than {MOST_BYTES} bytes; {REMEDY}")
        events = EventAccumulator(str(path), size_guidance={"scalars": 0})
        events.Reload()
    except ConfigError:
        raise
    except Exception as error:  # of TensorBoard's and protobuf's, which have many
        raise ConfigError(
            f"{cut(str(path))} is no event file of TensorBoard ({cut(str(error))}); {REMEDY}"
        ) from error
    return events


def read_run(folder: Path) -> Run:
    """Read every event file of `folder`; raises ConfigError without a training loss."""
    latest = read_events(folder)
    if TRAIN not in latest:
        raise ConfigError(
            f"a run must have logged {TRAIN!r} to TensorBoard; {cut(str(folder))} holds "
            f"{cut(str(sorted(latest)))}; use a run longer than its --log-interval"
        )
    return Run({tag: sorted(values.items()) for tag, values in latest.items()})
