"""Reading what Megatron prints: a line for each logged iteration, and one for each validation."""

import re
from collections.abc import Iterator
from pathlib import Path

from ep_plugin.errors import ConfigError
from ep_plugin.untrusted import check_regular, cut

Values = dict[str, dict[int, float]]  # tag -> iteration -> value

_ITERATION = re.compile(r"\biteration +(\d{1,15})/ *\d+ \|(.*)")
_VALIDATION = re.compile(r"validation loss at iteration (\d{1,15}) on validation set \|(.*)")
_NUMBER = re.compile(r" +(-?\d+(?:\.\d*)?(?:E[+-]?\d+)?|nan|-?inf)\b", re.IGNORECASE)
# What Megatron writes to TensorBoard under another name, or in another unit.
_TAGS = {"grad norm": ("grad-norm", 1.0), "learning rate": ("learning-rate", 1.0)}
_TAGS["elapsed time per iteration (ms)"] = ("iteration-time", 1e-3)  # s
_LINE = 1 << 16  # characters of a line that are read; Megatron's are shorter
MOST_TAGS = 10_000
_BYTES = 1 << 22  # of a file's beginning and of its end, to see whether it is such a log


def has_iterations(path: Path) -> bool:
    """Whether a file has a line of an iteration near its beginning or its end."""
    check_regular(path, "name a file with the run's output")
    with path.open("rb") as stream:
        text = stream.read(_BYTES)
        stream.seek(max(0, path.stat().st_size - _BYTES))
        text += stream.read(_BYTES)
    return b"\0" not in text and _ITERATION.search(text.decode(errors="replace")) is not None


def read_log(path: Path) -> Values:
    """Return the values of each tag, named as TensorBoard has them; the last of an iteration."""
    found: Values = {}
    with path.open(errors="replace") as stream:
        while line := stream.readline(_LINE):
            if len(found) > MOST_TAGS:
                raise ConfigError(
                    f"{cut(str(path))} names more than {MOST_TAGS} values, which no run logs; use "
                    "a file with the output of Megatron alone"
                )
            if match := _ITERATION.search(line):
                for name, value in _values(match[2]):
                    tag, factor = _TAGS.get(name.strip(), (name.strip(), 1.0))
                    found.setdefault(tag, {})[int(match[1])] = float(value) * factor
            elif match := _VALIDATION.search(line):
                for name, value in _values(match[2]):
                    if name.strip().endswith(" value"):
                        tag = f"{name.strip().removesuffix(' value')} validation"
                        found.setdefault(tag, {})[int(match[1])] = float(value)
    return found


def _values(text: str) -> Iterator[tuple[str, str]]:
    """Yield name and number of each part of a line, parts divided by |."""
    for part in text.split("|"):
        name, _, value = part.rpartition(":")
        if match := _NUMBER.match(value):
            yield name.rpartition(":")[2], match[1]
