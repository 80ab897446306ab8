"""Processes that a rank starts end when the rank does, however it ends.

Megatron saves in processes of the rank's own, and keeps a server for their results beside it. Each
waits for the rank's next word, also when the rank was killed, and holds its memory for ever. Here
every process that `multiprocessing` starts first watches the rank it works for: its end closes a
pipe, which the system does for a killed process too. Forked or spawned is alike.
"""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

from ep_plugin.megatron.seams.patches import Patches


def changes(patches: Patches) -> None:
    """Let what a rank starts end with it."""
    patches.wrap(
        "multiprocessing.process:BaseProcess.start",
        _start,
        "Megatron's save workers are started through it, in every release; they end with their rank",
    )


def _start(original: Callable[..., Any], process: Any) -> None:
    if process._target is not None:  # a class of its own may have none
        process._target = EndsWithParent(process._target)
    original(process)


class EndsWithParent:
    """A target that ends, with all of its process, when the process that started it does."""

    def __init__(self, target: Callable[..., Any]) -> None:
        self.target = target

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        parent = multiprocessing.parent_process()
        if parent is not None:
            threading.Thread(target=_watch, args=(parent.sentinel,), daemon=True).start()
        return self.target(*args, **kwargs)


def _watch(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os.kill(os.getpid(), signal.SIGKILL)  # nobody is left to be told anything
