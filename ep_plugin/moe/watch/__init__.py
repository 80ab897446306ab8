"""Which rank do the others wait for, and where was it last? See docs/reliability.md.

place.py        what each rank entered last, in host memory
neighbours.py   processes and memory of the ranks of one host
post.py         a text of each rank in the rendezvous store, every second or so
watcher.py      the thread that notices and speaks
blame.py        who is to blame, as a sentence
"""

import atexit
import os
import weakref
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from ep_plugin.moe.watch.place import State, here
from ep_plugin.moe.watch.post import PREFIX, first_line, say
from ep_plugin.moe.watch.watcher import AFTER, MISSED, SLOW, Watcher

__all__ = ["AFTER", "failed", "start", "stop"]

_watcher: Watcher | None = None
_world: weakref.ref[Any] | None = None  # the process group that it watches
_starts = 0  # of this process; texts of an earlier group may still be in the store


def start(after: float = AFTER, slow: float = SLOW) -> None:
    """Watch from this rank, until the process ends; every rank must call it.

    `after` is the seconds without a move after which a rank is told to wait; 0 starts nothing.
    `slow` is the same where all ranks are in one long work, such as a save. Needs the default
    process group. A second call does nothing, unless the group is another one. It ends no run:
    where this rank cannot be watched, one line says so.
    """
    global _watcher, _world, _starts
    if not after or dist.get_world_size() == 1:
        return
    if _watcher is not None:
        if _world is not None and _world() is dist.group.WORLD:
            return
        watcher, _watcher = _watcher, None
        watcher.end()
    _starts += 1
    rank = dist.get_rank()
    try:
        # The job's own store; the post takes a connection of its own to it.
        store = PrefixStore(f"{PREFIX}/{_starts}", _get_default_store())
        watcher = Watcher(store, rank, dist.get_world_size(), after, slow, _keeper())
        watcher.start()
    except Exception as error:  # memory to share, a descriptor or a thread is denied
        if rank == 0:
            why = f"{type(error).__name__}: {first_line(error)}"
            say(f"ranks are not watched, and the run goes on without ({why})")
        return
    here.fare(State.RUNNING)
    _watcher, _world = watcher, weakref.ref(dist.group.WORLD)
    atexit.unregister(stop)
    atexit.register(stop)


def stop() -> None:
    """End watching: this process ends as it should, or said before that it does not."""
    global _watcher
    watcher, _watcher = _watcher, None
    if watcher is None:
        return
    if here.seen().state is State.RUNNING:
        here.fare(State.ENDED)
    watcher.end()


def failed(error: BaseException) -> None:
    """Note that `error` ends this rank; add to one of an exchange which rank is to blame.

    For that it waits up to as long as another rank takes to fall silent.
    """
    if _watcher is None or isinstance(error, SystemExit | KeyboardInterrupt):
        return
    if not is_of_an_exchange(error):
        here.fare(State.FAILED, type(error).__name__)
        return
    here.fare(State.LOST, type(error).__name__)
    told = _watcher.explain(seconds=(MISSED + 2) * _watcher.interval)
    if told is not None:
        error.add_note(f"ep_plugin: {told}")


def is_of_an_exchange(error: BaseException) -> bool:
    """Whether an error says that ranks could not exchange, whichever of them is to blame."""
    text = str(error)
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and ("gloo" in text or "NCCL" in text)
    )


def _forget() -> None:
    """A forked process has none of the threads, and watches nothing."""
    global _watcher
    _watcher = None


def _keeper() -> str:
    """Return who keeps the rendezvous store."""
    address = ":".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return f"the store at {address}, which {'torchrun' if agent else 'rank 0'} keeps,"


os.register_at_fork(after_in_child=_forget)
