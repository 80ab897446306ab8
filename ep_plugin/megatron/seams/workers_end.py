"""Processes that a rank starts end when the rank does, however it ends.

Megatron saves in processes of the rank's own, and keeps a server for their results beside it. Each
waits for the rank's next word, also when the rank was killed, and holds its memory for ever. Here
every process that `multiprocessing` starts first watches the rank it works for: its end closes a
pipe, which the system does for a killed process too. Forked or spawned is alike. The other way
round, a rank whose standing save worker died ends with a sentence: it would wait for it for ever.
"""

import atexit
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

from ep_plugin.megatron.seams.patches import Patches


def changes(patches: Patches) -> None:
    """Let what a rank starts end with it."""
    patches.wrap(
        "multiprocessing.process:BaseProcess.start",
        _start,
        "Megatron's save workers start through it, in every release; they end with their rank",
    )
    patches.wrap(
        "megatron.core.dist_checkpointing.strategies.async_utils:PersistentAsyncCaller.close",
        _close,
        "the standing save worker ends after it, and is not missed",
    )


STANDING = "PersistentAsyncCaller"  # also in nvidia-resiliency-ext
_wanted_no_more = threading.Event()  # standing workers: this process closes them, or ends


def _start(original: Callable[..., Any], process: Any) -> None:
    target = process._target
    if target is not None:  # a class of its own may have none
        process._target = EndsWithParent(target)
    original(process)
    if getattr(target, "__qualname__", "").startswith(f"{STANDING}."):
        _wanted_no_more.clear()
        atexit.register(_wanted_no_more.set)  # before those of multiprocessing, which end workers
        threading.Thread(target=_mourn, args=(process.sentinel,), daemon=True).start()


def _close(original: Callable[..., Any], *args: Any, **settings: Any) -> Any:
    _wanted_no_more.set()
    return original(*args, **settings)


def _mourn(sentinel: int) -> None:
    """Wait for a standing worker's end; end the rank where nobody asked for it."""
    multiprocessing.connection.wait([sentinel])
    if not _wanted_no_more.is_set():
        print(
            "ep_plugin: error: the process that writes checkpoints for rank "
            f"{os.environ.get('RANK', '0')} (--use-persistent-ckpt-worker) died, and what it was "
            "writing is not saved; its own error is above, or the host's memory was not enough",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)  # the rank's main thread may wait for the worker


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
