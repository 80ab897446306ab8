"""What stands for a device's streams, events and generators on the CPU."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch

CPU = torch.device("cpu")


class Stream:
    """A stream of a device that finishes each call before the next begins."""

    cuda_stream = 0
    device = CPU

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *error: object) -> None: ...

    def synchronize(self) -> None: ...

    def wait_stream(self, other: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event if event is not None else Event()
        event.record()
        return event

    def query(self) -> bool:
        return True

    def is_capturing(self) -> bool:
        return False


class Event:
    """A point in time on the host's clock."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.seconds = time.perf_counter()

    def record(self, *stream: Any) -> None:
        self.seconds = time.perf_counter()

    def wait(self, *stream: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, later: "Event") -> float:
        """Milliseconds from this event to `later`."""
        return (later.seconds - self.seconds) * 1e3


class Generators(dict[int, torch.Generator]):
    """torch.cuda.default_generators: the CPU's generator under every index."""

    def __missing__(self, index: int) -> torch.Generator:
        return torch.default_generator


@contextlib.contextmanager
def device_context(device: Any = None) -> Iterator[None]:
    """torch.cuda.device: there is nothing to switch."""
    yield
