"""What a rank's processes do first. Each that is spawned imports this: standard library alone."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

TO_ALL = (signal.SIGTERM, signal.SIGINT)  # torchrun and a terminal send them to a whole group


class EndsWithParent:
    """A target that ends, with all of its process, when the process that started it does.

    One that `stands` ignores the signals that ask its rank to end: the rank may still save with it.
    """

    def __init__(self, target: Callable[..., Any], stands: bool) -> None:
        self.target = target
        self.stands = stands

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.stands:
            for number in TO_ALL:
                signal.signal(number, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, TO_ALL)
        parent = multiprocessing.parent_process()
        if parent is not None:
            threading.Thread(target=_watch, args=(parent.sentinel,), daemon=True).start()
        return self.target(*args, **kwargs)


def _watch(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os.kill(os.getpid(), signal.SIGKILL)  # nobody is left to be told anything
