"""Plain values as opcodes of a pickle, and the mark that all payloads bear."""

import struct
from dataclasses import dataclass
from typing import Any

MARK = "PLANTED"  # in the name of everything that a payload would make, import or connect to
MODULE = f"{MARK.lower()}_module"  # on sys.path; importing it makes the file


def literal(value: Any) -> bytes:
    """Return the opcodes that push a plain value; they use no memo."""
    if value is None:
        return b"N"
    if isinstance(value, bool):
        return b"\x88" if value else b"\x89"
    if isinstance(value, int):
        size = value.bit_length() // 8 + 1
        return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    if isinstance(value, str):
        data = value.encode("utf-8", "surrogatepass")
        return b"X" + struct.pack("<I", len(data)) + data
    if isinstance(value, bytes):
        return b"B" + struct.pack("<I", len(value)) + value
    if isinstance(value, tuple):
        return b"(" + b"".join(map(literal, value)) + b"t"
    if isinstance(value, list):
        return b"(" + b"".join(map(literal, value)) + b"l"
    if isinstance(value, dict):
        return b"(" + b"".join(literal(k) + literal(v) for k, v in value.items()) + b"d"
    if isinstance(value, Ops):
        return value.code
    raise TypeError(type(value))


@dataclass(frozen=True)
class Ops:
    """Opcodes that push one object."""

    code: bytes
