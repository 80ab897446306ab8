"""What goes along into a new checkpoint: plain values, tensors, and objects of an exact list.

An object of Megatron's (an enumeration's member) stays the stand-in that it was read as, and is
written back under its own name. Whoever loads the result runs what its pickle names, so a name that
is not on the list is never written.
"""

import argparse
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from ep_plugin.checkpoint.inert import Made, Name, Persistent
from ep_plugin.errors import ConfigError
from ep_plugin.untrusted import cut

STAND_INS = (Made, Name, Persistent)
EXTRA_STATE = "_extra_state"  # of the layers that Transformer Engine has built
# Enumerations: made by a call with the member's value, a number or a word.
_MEGATRON = "megatron.core"
ENUMERATIONS = frozenset(
    {
        ("signal", "Signals"),
        (f"{_MEGATRON}.enums", "Fp4Recipe"),
        (f"{_MEGATRON}.enums", "Fp8Recipe"),
        (f"{_MEGATRON}.enums", "ModelType"),
        (f"{_MEGATRON}.rerun_state_machine", "RerunDiagnostic"),
        (f"{_MEGATRON}.rerun_state_machine", "RerunMode"),
        (f"{_MEGATRON}.rerun_state_machine", "RerunState"),
        (f"{_MEGATRON}.rerun_state_machine", "RerunValidationStatus"),
        (f"{_MEGATRON}.transformer.enums", "AttnBackend"),
        (f"{_MEGATRON}.transformer.enums", "AttnMaskType"),
        (f"{_MEGATRON}.transformer.enums", "AttnType"),
        (f"{_MEGATRON}.transformer.enums", "CudaGraphModule"),
        (f"{_MEGATRON}.transformer.enums", "CudaGraphScope"),
        (f"{_MEGATRON}.transformer.enums", "InferenceCudaGraphScope"),
        (f"{_MEGATRON}.transformer.enums", "LayerType"),
        (f"{_MEGATRON}.transformer.enums", "ModelType"),
    }
)


PATHS = frozenset({("pathlib", "PosixPath"), ("pathlib._local", "PosixPath")})
# What Megatron itself takes for safe to load, beside those; none of it is copied.
_NUMPY = ("numpy._core.multiarray", "numpy.core.multiarray")
HARMLESS = frozenset(
    {
        *((module, "_reconstruct") for module in _NUMPY),
        *((module, "scalar") for module in _NUMPY),
        ("numpy", "dtype"),
        ("numpy", "ndarray"),
        ("numpy.dtypes", "UInt32DType"),
        ("types", "SimpleNamespace"),
        ("_io", "BytesIO"),
        ("torch._C", "Generator"),
        (f"{_MEGATRON}.optimizer.optimizer_config", "OptimizerConfig"),
    }
)


def is_carried(made: Made) -> bool:
    """Whether a stand-in is an enumeration's member or a path, and nothing beside."""
    if not made.called or made.state is not None or made.items is not None:
        return False
    if made.kind.key in PATHS:
        return all(type(part) is str for part in made.arguments)
    member = made.kind.key in ENUMERATIONS and len(made.arguments) == 1
    return member and type(made.arguments[0]) in (int, str)


def engine_reads(name: str, value: Any) -> bool:
    """Whether an object is a state that Transformer Engine would unpickle: one that says anything.

    It lies in a tensor or a file of bytes, whose dtype or class does not matter to whoever hides
    something there; so an empty one alone is taken for harmless.
    """
    if EXTRA_STATE not in name:
        return False
    waiting, seen = [value], set()
    while waiting:
        found = waiting.pop()
        if isinstance(found, (list, tuple)):
            if id(found) not in seen:
                seen.add(id(found))
                waiting += found
        elif isinstance(found, Tensor):
            if found.numel():
                return True
        elif found not in (None, b"", ""):
            return True
    return False


def check_copied(name: str, value: Any, folder: Path) -> None:
    """Raise ConfigError where an object to be copied as it is could have anything run."""
    remedy = "use --leave-out _extra_state, and the run starts with empty ones"
    for _, kind in _strange(value):
        raise ConfigError(f"{cut(name)} in {folder} holds {kind}, which is not copied; {remedy}")
    if engine_reads(name, value):
        raise ConfigError(
            f"{cut(name)} in {folder} is a state that only Transformer Engine can read, which "
            f"is not copied: it would run what is in it; {remedy}"
        )


def dangers(value: Any) -> Iterator[tuple[str, str]]:
    """Yield where `value` names what whoever loads it would run, and what that is."""
    waiting, seen = list(_leaves(value, STAND_INS)), set()
    while waiting:
        path, found = waiting.pop()
        if id(found) in seen:
            continue
        seen.add(id(found))
        kind = found.kind if type(found) is Made else found
        if type(kind) is Name and kind.key not in HARMLESS | ENUMERATIONS | PATHS:
            yield path, kind_of(found)
        if type(found) is Made:
            inner = [*found.arguments, found.state, found.items]
            waiting += [(path, leaf) for _, leaf in _leaves(inner, STAND_INS)]


def is_plain(value: Any) -> bool:
    """Whether a value holds no stand-in at all, not even of the list."""
    return next(_leaves(value, STAND_INS), None) is None


def check_carried(common: dict[str, Any], folder: Path) -> None:
    """Raise ConfigError where what is to be written holds an object that is on no list."""
    for path, kind in _strange(common):
        first, _, rest = path.partition(".")
        name = rest.split(".")[0] if first == "args" else path
        remedy = f"use --leave-out {cut(name)}" if first == "args" else "use --drop-optimizer"
        raise ConfigError(
            f"{cut(path)} in {folder} is {kind}, which is not copied: whoever loads the result "
            f"would run code of that name; {remedy}"
        )


def leave_out(args: argparse.Namespace, names: Collection[str]) -> argparse.Namespace:
    """Return run arguments without those of `names`; raises ConfigError where one is not there."""
    names = [name for name in names if name != EXTRA_STATE]
    for name in names:
        if name not in vars(args):
            raise ConfigError(
                f"--leave-out {name} is no run argument of the checkpoint; leave {name} out of "
                "--leave-out"
            )
    kept = {name: value for name, value in vars(args).items() if name not in names}
    return argparse.Namespace(**kept)


def kind_of(value: Any) -> str:
    """Return what a stand-in is of, for a message."""
    if type(value) is Made:
        return f"an object of {value.kind}"
    return f"{value}" if type(value) is Name else "part of a tensor"


def _strange(value: Any) -> Iterator[tuple[str, str]]:
    """Yield where in `value` an object is that no list has, and its class."""
    for path, found in _leaves(value, STAND_INS):
        if type(found) is not Made or not is_carried(found):
            yield path, kind_of(found)


def _leaves(value: Any, kinds: tuple[type, ...]) -> Iterator[tuple[str, Any]]:
    """Yield every object of these classes in `value`, and where it is."""
    seen: set[int] = set()

    def walk(value: Any, path: str) -> Iterator[tuple[str, Any]]:
        if isinstance(value, kinds):
            yield path, value
            return
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, argparse.Namespace):
            value = vars(value)
        if isinstance(value, dict):
            for key, item in value.items():
                yield from walk(key, path)
                yield from walk(item, f"{path}.{key}" if path else str(key))
        elif isinstance(value, (list, tuple, set, frozenset)):
            for item in value:
                yield from walk(item, path)

    return walk(value, "")
