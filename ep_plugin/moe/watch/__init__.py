"""Which rank do the others wait for, and where was it last? See docs/reliability.md.

place.py        what each rank entered last, in host memory
neighbours.py   processes and memory of the ranks of one host
post.py         a text of each rank in the rendezvous store, every second or so
watcher.py      the thread that notices and speaks
blame.py        who is to blame, as a sentence
"""

import atexit
import os

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from ep_plugin.moe.watch.place import State, here
from ep_plugin.moe.watch.post import PREFIX
from ep_plugin.moe.watch.watcher import AFTER, MISSED, Watcher

__all__ = ["AFTER", "failed", "start", "stop"]

_watcher: Watcher | None = None


def start(after: float = AFTER) -> None:
    """Watch from this rank, until the process ends; every rank must call it.

    `after` is the seconds without a move after which a rank is told to wait; 0 starts nothing.
    Needs the default process group. A second call does nothing.
    """
    global _watcher
    if _watcher is not None or not after or dist.get_world_size() == 1:
        return
    # The job's own store, through a connection of this thread's own.
    store = PrefixStore(PREFIX, _get_default_store().clone())
    _watcher = Watcher(store, dist.get_rank(), dist.get_world_size(), after, _keeper())
    _watcher.start()
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
