"""The names that a pickle may say and that become real values, and how: each value is checked.

What of these may be combined, and how deep, is `_values.py`.
"""

import argparse
import struct
import sys
from collections import OrderedDict
from collections.abc import Callable
from math import prod
from typing import Any, TypeGuard

import torch
from torch import Tensor

from ep_plugin.checkpoint.inert import Made, Name, Unreadable, Unsupported
from ep_plugin.untrusted import cut

MAX_SIZE = 1 << 62
_REPEATED = 4096  # values that an expanded tensor may show beyond those that it has

DTYPES = {
    name: getattr(torch, name)
    for name in (
        *("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8"),
        *("bool", "complex64", "complex128", "uint16", "uint32", "uint64", "float8_e4m3fn"),
        *("float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
    )
    if hasattr(torch, name)
}
NAMED = {
    **{("torch", name): dtype for name, dtype in DTYPES.items()},
    ("torch", "strided"): torch.strided,
    ("torch", "preserve_format"): torch.preserve_format,
    ("torch", "contiguous_format"): torch.contiguous_format,
}
_NUMPY_CODES = {
    **{"b1": "?", "i1": "b", "i2": "h", "i4": "i", "i8": "q", "f4": "f", "f8": "d"},
    **{"u1": "B", "u2": "H", "u4": "I", "u8": "Q"},
}
_DEVICES = ("cpu", "cuda", "meta")


def need(fits: bool, what: str, value: Any) -> None:
    if not fits:
        raise Unreadable(f"{what} in it is none: {cut(_words(value))}")


def _words(value: Any) -> str:
    """Return a value's words; of what may be long or nested its kind alone."""
    if type(value) in (str, bool, float, Name, type(None)):
        return repr(value)
    if type(value) is int and value.bit_length() < 128:
        return repr(value)
    return f"a {type(value).__name__}"


def is_size(value: Any) -> TypeGuard[int]:
    """Whether a value is a number of elements, or a place in a tensor or a file."""
    return type(value) is int and 0 <= value <= MAX_SIZE


def sizes(value: Any) -> tuple[int, ...]:
    """Return a shape; raises Unreadable when it is none."""
    fits = isinstance(value, (tuple, list)) and len(value) <= 64 and all(map(is_size, value))
    # Of no elements at all, torch multiplies the other sizes too.
    need(fits and is_size(prod(size or 1 for size in value)), "a shape", value)
    return tuple(value)


def _bare(made: Made, called: bool, count: int) -> tuple[Any, ...]:
    """Return the arguments where there are so many, and nothing else."""
    fits = made.called == called and len(made.arguments) == count
    need(fits and made.state is None and made.items is None, f"a {made.kind}", None)
    return made.arguments


def _size(made: Made) -> torch.Size:
    return torch.Size(sizes(*_bare(made, True, 1)))


def _namespace(made: Made) -> argparse.Namespace:
    state = made.state or {}
    fits = type(state) is dict and not made.arguments and made.items is None
    need(fits, "a Namespace", made.state)
    space = argparse.Namespace()
    for name, value in state.items():
        need(type(name) is str and not name.startswith("__"), "an argument's name", name)
        vars(space)[sys.intern(name)] = value
    return space


def _ordered(made: Made) -> "OrderedDict[Any, Any]":
    need(not any(made.arguments), "an OrderedDict", None)
    return OrderedDict(made.items or ())


def _tensor(made: Made) -> Tensor:
    need(made.called and len(made.arguments) in (6, 7), "a tensor", None)
    storage, offset, size, stride, requires_grad, _ = made.arguments[:6]
    _no_bits(made.arguments[6:])
    return _view(storage, offset, size, stride, requires_grad)


def _no_bits(metadata: tuple[Any, ...]) -> None:
    """A tensor that stands for the negative or the conjugate of its values is not read."""
    if any(bits not in (None, {}) for bits in metadata):
        raise Unsupported("a tensor in it is a view that torch negates or conjugates as it reads")


def _typed_tensor(made: Made) -> Tensor:
    need(made.called and len(made.arguments) in (7, 8), "a tensor", None)
    storage, offset, size, stride, requires_grad, _, dtype = made.arguments[:7]
    _no_bits(made.arguments[7:])
    fits = isinstance(dtype, torch.dtype) and isinstance(storage, Tensor)
    need(fits and storage.nbytes % dtype.itemsize == 0, "a tensor's dtype", dtype)
    return _view(storage.view(dtype), offset, size, stride, requires_grad)


def _view(storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any) -> Tensor:
    """Return part of a storage: every element of it inside."""
    shape, steps = sizes(size), sizes(stride)
    fits = isinstance(storage, Tensor) and is_size(offset) and len(shape) == len(steps)
    need(fits, "a tensor", storage)
    count = prod(shape)
    last = offset + sum((n - 1) * step for n, step in zip(shape, steps, strict=True))
    inside = count == 0 or last < storage.numel()
    if not inside or count > max(storage.numel(), _REPEATED) or max(shape, default=0) > 1 << 60:
        raise Unreadable(
            f"a tensor in it has shape {list(shape)}, and its storage {storage.numel()} elements"
        )
    if count == 0:
        offset = 0
    view: Tensor = storage.as_strided(shape, steps, offset)
    if requires_grad is True and (view.is_floating_point() or view.is_complex()):
        view.requires_grad_()
    return view


def _parameter(made: Made) -> Tensor:
    need(made.called and len(made.arguments) in (3, 4), "a parameter", None)
    values, requires_grad = made.arguments[:2]
    need(isinstance(values, Tensor) and type(requires_grad) is bool, "a parameter", values)
    floating = values.is_floating_point() or values.is_complex()
    return torch.nn.Parameter(values.detach(), requires_grad and floating)


def _layout(made: Made) -> torch.layout:
    (said,) = _bare(made, True, 1)
    need(said == "torch.strided", "a layout", said)
    return torch.strided


def _bytes(made: Made) -> bytes:
    text, encoding = _bare(made, True, 2)
    need(type(text) is str and encoding == "latin1", "bytes", encoding)
    try:
        return str(text).encode("latin1")
    except UnicodeError as error:
        raise Unreadable("bytes in it are no bytes") from error


def _empty_bytes(made: Made) -> bytes:
    _bare(made, True, 0)
    return b""


def _bytearray(made: Made) -> bytearray:
    """Return what protocols below 5 make of bytes, or of text that stands for them."""
    if len(made.arguments) == 2:
        text, encoding = _bare(made, True, 2)
        fits = type(text) is str and encoding == "latin-1" and all(ord(c) < 256 for c in text)
        need(fits, "a bytearray", encoding)
        return bytearray(text, "latin-1")
    arguments = _bare(made, True, len(made.arguments))
    need(all(type(one) is bytes for one in arguments) and len(arguments) < 2, "a bytearray", None)
    return bytearray(*arguments)


def items_of_set(made: Made) -> list[Any]:
    (values,) = _bare(made, True, 1)
    need(type(values) is list, "a set", None)
    found: list[Any] = values
    return found


def _number(made: Made) -> Any:
    """Return a scalar of numpy as a number; one of another dtype stays inert."""
    if not made.called or len(made.arguments) != 2:
        return made
    dtype, raw = made.arguments
    if type(dtype) is not Made or dtype.kind.key != ("numpy", "dtype") or not dtype.arguments:
        return made
    code, state = dtype.arguments[0], dtype.state
    little = type(state) is tuple and len(state) > 1 and state[1] in ("<", "|")
    if type(code) is not str or code not in _NUMPY_CODES or not little:
        return made
    form = struct.Struct("<" + _NUMPY_CODES[code])
    need(type(raw) is bytes and len(raw) == form.size, "a number of numpy", None)
    return form.unpack(raw)[0]


def _device(made: Made) -> torch.device:
    fits = made.called and len(made.arguments) in (1, 2) and made.state is None
    need(fits and made.arguments[0] in _DEVICES, "a device", None)
    number = made.arguments[1] if len(made.arguments) == 2 else None
    need(number is None or (is_size(number) and number < 128), "a device", number)
    return torch.device(made.arguments[0]) if number is None else torch.device(*made.arguments)


BUILDERS: dict[tuple[str, str], Callable[[Made], Any]] = {
    ("argparse", "Namespace"): _namespace,
    ("collections", "OrderedDict"): _ordered,
    ("torch", "Size"): _size,
    ("torch", "device"): _device,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _typed_tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch.serialization", "_get_layout"): _layout,
    ("_codecs", "encode"): _bytes,
    **{(module, "bytes"): _empty_bytes for module in ("__builtin__", "builtins")},
    **{(module, "bytearray"): _bytearray for module in ("__builtin__", "builtins")},
    ("numpy.core.multiarray", "scalar"): _number,
    ("numpy._core.multiarray", "scalar"): _number,
}

SETS: dict[tuple[str, str], type] = {
    (module, kind.__name__): kind
    for module in ("__builtin__", "builtins")
    for kind in (set, frozenset)
}
