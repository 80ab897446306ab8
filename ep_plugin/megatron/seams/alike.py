"""Ranks compare what must be equal: before the process group is made, and once the model is built.

`init_process_group` is where every rank passes with its arguments validated and nobody has
communicated. The rendezvous store is made here as it would be made there, and handed on. Where the
group was made earlier, by a script or by what starts its workers, they compare in front of Megatron
making its groups, through the group's own store.

A rank that fails before that says so in the store, so that the others end with its sentence.
"""

import inspect
import math
import os
import sys
from collections.abc import Callable, Mapping
from datetime import timedelta
from importlib import import_module
from typing import Any, NoReturn

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, default_pg_timeout

from ep_plugin.errors import ConfigError
from ep_plugin.megatron.ranks.answers import Answer
from ep_plugin.megatron.ranks.compared import Compared, of_arguments, of_settings, subject
from ep_plugin.megatron.ranks.meeting import Meeting
from ep_plugin.megatron.ranks.rendezvous import (
    given_or_environment,
    rendezvous_store,
    seconds_since_start,
    store_of_environment,
    store_of_group,
)
from ep_plugin.megatron.ranks.sentence import Flags, flags_of
from ep_plugin.megatron.seams.for_torchrun import leave_for_torchrun
from ep_plugin.megatron.seams.patches import Patches

TRAINING = "megatron.training.training"
START, MODEL = "start", "model"
TIMEOUT = "EP_PLUGIN_START_TIMEOUT"
_PATIENCE = 60.0  # seconds without a newcomer at least, beyond what this rank's own start took
_TO_CONNECT, _TO_HEAR = 15.0, 30.0  # seconds of a rank that failed and says so
_LONGEST = 1e6  # seconds that can be asked for
_TO_HEAR_OF_A_MODEL = 2.0  # where nobody knows whether the others will compare one


class _State:
    """Where this process stands; one for each install."""

    def __init__(self, layer_class: Any, patience: float | None) -> None:
        self.layer_class = layer_class
        self.patience = patience  # that the user gave
        self.group: Any = None  # the default group whose ranks have compared
        self.next: str | None = START  # the meeting that a rank that fails would miss
        self.told = False  # that this rank fails, or ends
        self.model_compared = False
        self.in_setup = False  # in the call that builds and compares the model
        self.timeout: timedelta | None = None  # of the process group


def patience_given() -> float | None:
    """Return EP_PLUGIN_START_TIMEOUT in seconds; raises ConfigError when it is no such number."""
    said = os.environ.get(TIMEOUT)
    if not said:
        return None
    try:
        seconds = float(said)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= _LONGEST:
        raise ConfigError(
            f"{TIMEOUT} must be a number of seconds above 0 and up to {_LONGEST:,.0f}; got "
            f"{said!r}; use for example {TIMEOUT}=3600"
        )
    return seconds


_past: set[str] = set()  # meetings that are over; a process may start more than once
_before_install: list[_State] = []  # made when a rank fails that early


def changes(patches: Patches, layer_class: Any, training: bool) -> None:
    """Note where ranks compare."""
    layer_class.alike = state = _State(layer_class, patience_given())
    patches.wrap(
        "torch.distributed:init_process_group",
        lambda original, *args, **kwargs: _around_init(state, original, args, kwargs),
        "arguments are validated and nobody has communicated: ranks compare them here",
    )
    patches.wrap(
        "megatron.core.parallel_state:initialize_model_parallel",
        lambda original, *args, **kwargs: _before_groups(state, original, args, kwargs),
        "groups are made here; ranks whose process group was there already compare before",
    )
    if training:
        patches.wrap(
            f"{TRAINING}:get_megatron_optimizer",
            lambda original, *args, **kwargs: _before_optimizer(state, original, args, kwargs),
            "the model is built and nothing loaded: ranks compare parameters and layers",
        )
        patches.wrap(
            f"{TRAINING}:setup_model_and_optimizer",
            lambda original, *args, **kwargs: _around_setup(state, original, args, kwargs),
            "a run without that optimizer compares its model here",
        )
    patches.at_exit(_tell_of_an_error, "a rank that failed at its start says so to the others")


def _around_init(
    state: _State, original: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]
) -> Any:
    given = inspect.signature(original).bind(*args, **kwargs).arguments
    parsed = _arguments()
    rank, size = (given_or_environment(given, name) for name in ("rank", "world_size"))
    backend = str(given.get("backend") or "")
    if parsed is None or rank is None or size is None or size < 2 or backend in ("mpi", "fake"):
        return original(*args, **kwargs)
    timeout = given.get("timeout") or timedelta(minutes=parsed.distributed_timeout_minutes)
    state.timeout = timeout
    store = given.get("store")
    if store is None:
        store = rendezvous_store(given.get("init_method"), rank, size, timeout)
    given |= {"rank": rank, "world_size": size}
    state.next, state.told = START, False  # also in a process that started before
    key = _compare(state, store, rank, size, _of_arguments(state, parsed, size))
    if given.get("store") is None:  # torch would look at what an earlier start left in it
        given["store"] = PrefixStore(f"default_pg/{key}", store)
        given.pop("init_method", None)
    result = original(**given)
    state.group = dist.group.WORLD
    return result


def _before_groups(
    state: _State, original: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]
) -> Any:
    if dist.is_initialized() and dist.get_world_size() > 1 and state.group is not dist.group.WORLD:
        rank, size, store = dist.get_rank(), dist.get_world_size(), store_of_group()
        if store is not None:
            parsed = _arguments()
            if parsed is not None:
                compared = _of_arguments(state, parsed, size)
            else:
                groups = inspect.signature(original).bind(*args, **kwargs).arguments
                settings = getattr(state.layer_class, "settings", None)
                compared = of_settings(settings, groups, size)
            _compare(state, store, rank, size, compared)
            state.group = dist.group.WORLD
    return original(*args, **kwargs)


def _before_optimizer(
    state: _State, original: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]
) -> Any:
    given = list(inspect.signature(original).bind(*args, **kwargs).arguments.values())
    _compare_model(state, given[1])
    return original(*args, **kwargs)


def _around_setup(
    state: _State, original: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]
) -> Any:
    state.model_compared, state.in_setup = False, True
    result = original(*args, **kwargs)
    if not state.model_compared:
        _compare_model(state, result[0])
    state.in_setup = False  # stays where an error ends the call
    return result


def _of_arguments(state: _State, parsed: Any, size: int) -> Compared:
    """Return what this rank compares; arguments of the script itself are told from Megatron's."""
    parser = getattr(state.layer_class, "parser", None)
    theirs: set[str] = getattr(state.layer_class, "known", set())
    added = {action.dest for action in parser._actions} - theirs if parser is not None else set()
    return of_arguments(parsed, state.layer_class.typed or {}, added, size)


def _compare(state: _State, store: Any, rank: int, size: int, compared: Compared) -> str:
    """Compare with all ranks; a difference ends this one. Return what only this start is called."""
    about = subject(START, _flags(state))
    meeting = _meeting(state, store, rank, size)
    _heed(state, _meet(meeting, about, compared.record(), compared.whole), rank)
    state.next = MODEL
    return meeting.key


def _compare_model(state: _State, chunks: Any) -> None:
    from ep_plugin.megatron.ranks.model import held
    from ep_plugin.megatron.ranks.model import subject as about_model

    state.model_compared = True
    mpu = import_module("megatron.core.parallel_state")
    store = store_of_group() if dist.is_initialized() else None
    args = _arguments()
    # Weights that are spread over further ranks have shapes of their own there.
    spread = (getattr(args, name, 1) for name in ("gtp_weight_remat_size",))
    if store is None or dist.get_world_size() < 2 or any((n or 1) > 1 for n in spread):
        return
    if not mpu.model_parallel_is_initialized():
        return
    rank, size = dist.get_rank(), dist.get_world_size()
    found = held(chunks if isinstance(chunks, (list, tuple)) else [chunks])
    meeting = _meeting(state, store, rank, size)
    _heed(state, _meet(meeting, about_model(MODEL), found.record(), found.whole), rank)
    state.next = None


def _meet(meeting: Meeting, *what: Any) -> Answer:
    try:
        return meeting.agree(*what)
    except RuntimeError as error:
        return Answer(False, f"the store in which ranks compare their settings is gone: {error}")


def _meeting(state: _State, store: Any, rank: int, size: int) -> Meeting:
    """Return this rank's part; keys have a prefix of their own, beside those of others."""
    environment = os.environ.get
    run = environment("TORCHELASTIC_RUN_ID")
    # Only what torchrun sets is alike on all ranks for sure.
    prefix = f"ep_plugin/{run}/{environment('MASTER_PORT')}" if run else "ep_plugin"
    return Meeting(
        *(PrefixStore(prefix, store), rank, size, _patience(state)),
        past=_past,
        say=lambda text: print(f"ep_plugin: {text}", file=sys.stderr, flush=True),
    )


def _patience(state: _State) -> float:
    """Return the seconds without a newcomer that end a comparison: what torch would wait too."""
    if state.patience is not None:
        return state.patience
    timeout = state.timeout
    if timeout is None:
        parsed = _arguments()
        minutes = getattr(parsed, "distributed_timeout_minutes", None)
        timeout = timedelta(minutes=minutes) if minutes else default_pg_timeout
    return max(_PATIENCE + seconds_since_start(), timeout.total_seconds())


def _heed(state: _State, answer: Answer, rank: int) -> None:
    if answer.fine:
        if answer.text and rank == 0:
            print(f"ep_plugin: {answer.text}", file=sys.stderr, flush=True)
        return
    state.told = True
    _end(answer.text)


def _end(text: str) -> NoReturn:
    sys.stderr.write(f"ep_plugin: error: {text}\n")  # in one piece, between those of others
    sys.stderr.flush()
    leave_for_torchrun(text)
    sys.exit(1)


def _flags(state: _State) -> Flags:
    return flags_of(getattr(state.layer_class, "parser", None))


def _arguments() -> Any:
    """Return Megatron's arguments once they are validated; None before, and without its loop."""
    module = sys.modules.get("megatron.training.global_vars")
    try:
        return module.get_args() if module is not None else None
    except AssertionError:  # Megatron's word for none
        return None


def tell(sentence: str) -> bool:
    """Tell the other ranks that this one ends at its start with `sentence`; once.

    Whether somebody knows it now: rank 0 prints it, or what rank 0 failed with itself. False
    too where there is no other rank to tell, or no store.
    """
    state = _state()
    if state.told or state.next is None:
        return False
    state.told = True
    try:
        place = _place_to_tell()
        if place is None:
            return False
        surely = state.next == START or state.in_setup
        wait = _TO_HEAR if surely else _TO_HEAR_OF_A_MODEL
        return _meeting(state, *place).fail(state.next, sentence, wait) is not None
    except (RuntimeError, ValueError, OSError):
        return False


def ranks_to_tell() -> bool:
    """Whether other ranks could have been told: those that all made their model ask no more."""
    return _state().next is not None and _has_others()


def _has_others() -> bool:
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return all(os.environ.get(name) for name in names) and os.environ["WORLD_SIZE"] != "1"


def _place_to_tell() -> tuple[Any, int, int] | None:
    if dist.is_initialized():
        store = store_of_group()
        return None if store is None else (store, dist.get_rank(), dist.get_world_size())
    if not _has_others():
        return None
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return store_of_environment(rank, size, timedelta(seconds=_TO_CONNECT)), rank, size


def _tell_of_an_error() -> None:
    error, state = getattr(sys, "last_value", None), _state()
    if state.next != START and not state.in_setup:
        return
    if error is not None and getattr(state.layer_class, "used", False):
        tell(f"{type(error).__name__}: {(str(error).strip() or 'no words').splitlines()[0]}")


def _installed() -> _State | None:
    specs = sys.modules.get("megatron.core.models.gpt.moe_module_specs")
    return getattr(getattr(specs, "MoELayer", None), "alike", None)


def _state() -> _State:
    """Return where this process stands; a state of its own before `install`, or without it."""
    found = _installed()
    if found is None:
        found = next(iter(_before_install), None) or _State(None, None)
        _before_install[:] = [found]
    return found
