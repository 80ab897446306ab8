"""TensorBoard's event files with something planted in them."""

import random
import struct
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

from tests.hostile import pickles, texts

TAGS = (
    "lm loss", "lm loss validation", "load_balancing_loss", "ep/tokens_per_expert/layer_1/expert_0",
    "ep/tokens_per_expert/layer_99999999999/expert_5",
    "ep/tokens_per_expert/layer_1/expert_7000000",
    "ep/tokens_per_expert/layer_-1/expert_x", "grad-norm", "iteration-time", "", "a/" * 2000,
    "x\n" * 50,
)  # fmt: skip
NUMBERS = (1.0, 0.0, -1.0, float("nan"), float("inf"), -float("inf"), 1e38)


def record(data: bytes, whole: bool = True) -> bytes:
    """Return a record of the file: its length, a checksum, the data, a checksum."""
    length = struct.pack("<Q", len(data) if whole else 1 << 40)
    sums = [struct.pack("<I", masked_crc32c(part)) for part in (length, data)]
    return length + sums[0] + data + sums[1]


def scalar(tag: str, step: int, value: float, wall_time: float = 1.0) -> bytes:
    """Return an event with one value."""
    summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
    event = Event(wall_time=wall_time, step=step, summary=summary)
    return bytes(event.SerializeToString())


def events_file(rng: random.Random, outside: Path, benign: bytes) -> tuple[str, bytes]:
    """Return (kind, bytes) of an event file."""
    kind = rng.choice(("tags", "tags", "numbers", "records", "damaged", "raw"))
    if kind == "damaged":
        return "events: damaged", pickles.damaged(rng, benign)[1]
    if kind == "raw":
        return "events: raw", rng.choice((b"", rng.randbytes(5000), b"\0" * 64))
    if kind == "records":
        more = record(rng.randbytes(40), whole=rng.random() < 0.5)
        return "events: records", rng.choice((more + benign, benign + more))
    data = benign
    for _ in range(rng.choice((1, 3, 20))):
        tags = (*texts.HTML, *texts.shell(outside), *TAGS)
        tag = rng.choice(tags if kind == "tags" else TAGS[:4])
        step = rng.choice((0, 1, 30, -5, (1 << 62), 10**9))
        time = rng.choice((1.0, 1e9, -1.0, float("nan"), 1e300))
        tag = tag.encode("utf-8", "replace").decode()
        data += record(scalar(tag, step, rng.choice(NUMBERS), time))
    return f"events: {kind}", data
