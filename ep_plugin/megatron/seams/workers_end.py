"""Processes that a rank starts end when the rank does, however it ends.

Megatron saves in processes of the rank's own, and keeps a server for their results beside it. Each
waits for the rank's next word, also when the rank was killed, and holds its memory for ever. Here
every process that `multiprocessing` starts first watches the rank it works for: its end closes a
pipe, which the system does for a killed process too. Forked or spawned is alike. The other way
round, a rank whose standing save worker died ends with a sentence: it would wait for it for ever.
A standing worker outlives the SIGTERM that its rank handles, in the middle of a last save.
"""

import multiprocessing.connection
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from ep_plugin.megatron.seams.patches import Patches
from ep_plugin.megatron.seams.with_parent import TO_ALL, EndsWithParent


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
REAPED = 10  # seconds within which the exit code of a worker that ended is known
# Of each standing worker that this process ends, by a class's close or with itself.
_asked: "WeakKeyDictionary[Any, threading.Event]" = WeakKeyDictionary()


def _start(original: Callable[..., Any], process: Any) -> None:
    target = process._target
    stands = getattr(target, "__qualname__", "").startswith(f"{STANDING}.")
    if target is not None:  # a class of its own may have none
        process._target = EndsWithParent(target, stands)
    if not stands:
        original(process)
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, TO_ALL)  # it inherits this, till it ignores
    try:
        original(process)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    asked = _asked[process] = threading.Event()
    _let_be_ended(process._popen, asked)
    threading.Thread(target=_mourn, args=(process, asked), daemon=True).start()


def _let_be_ended(popen: Any, asked: threading.Event) -> None:
    """Let this process end a worker that ignores SIGTERM, as multiprocessing does at its exit."""
    kill = popen.kill

    def end() -> None:
        asked.set()
        kill()

    popen.terminate = popen.kill = end


def _close(original: Callable[..., Any], caller: Any, *rest: Any, **settings: Any) -> Any:
    asked = _asked.get(caller.process) if caller.process is not None else None
    if asked is not None:
        asked.set()
    return original(caller, *rest, **settings)


def _mourn(process: Any, asked: threading.Event) -> None:
    """Wait for a standing worker's end; end the rank where it did not end well, unasked."""
    multiprocessing.connection.wait([process.sentinel])
    if not asked.is_set() and _exit_code(process) != 0 and not asked.is_set():
        print(
            "ep_plugin: error: the process that writes checkpoints for rank "
            f"{os.environ.get('RANK', '0')} (--use-persistent-ckpt-worker) died, and what it was "
            "writing is not saved; its own error is above, or the host's memory was not enough",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)  # the rank's main thread may wait for the worker


def _exit_code(process: Any) -> int | None:
    """Return how an ended process ended; None: unknown. Another thread may wait for it too."""
    deadline = time.monotonic() + REAPED
    code: int | None = process.exitcode
    while code is None and time.monotonic() < deadline:
        time.sleep(0.01)
        code = process.exitcode
    return code
