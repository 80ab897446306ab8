"""Pickles that call something while they are loaded, put together opcode by opcode.

Whatever a payload would do is harmless: it makes a file called PLANTED in a folder of the sandbox.
"""

import random
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.hostile import called
from tests.hostile.opcodes import MARK as MARK
from tests.hostile.opcodes import MODULE as MODULE
from tests.hostile.opcodes import Ops as Ops
from tests.hostile.opcodes import literal as literal


def named(rng: random.Random, module: str, name: str) -> bytes:
    """Push the object of that name: GLOBAL or STACK_GLOBAL, sometimes with a dotted name."""
    line = f"c{module}\n{name}\n".encode()
    on_stack = literal(module) + literal(name) + b"\x93"
    package, _, last = module.rpartition(".")
    if package and rng.random() < 0.3:
        return literal(package) + literal(f"{last}.{name}") + b"\x93"
    return rng.choice((line, on_stack))


Way = Callable[[random.Random, bytes, Sequence[Any]], bytes]
# How an opcode calls, or builds: what is on the stack, then the opcode.
WAYS: dict[str, Way] = {
    "REDUCE": lambda rng, made, args: made + literal(tuple(args)) + b"R",
    "NEWOBJ": lambda rng, made, args: made + literal(tuple(args)) + b"\x81",
    "NEWOBJ_EX": lambda rng, made, args: made + literal(tuple(args)) + literal({}) + b"\x92",
    "OBJ": lambda rng, made, args: b"(" + made + b"".join(map(literal, args)) + b"o",
    "BUILD on the name": lambda rng, made, args: made + literal({MARK: 1}) + b"b",
    "BUILD with slots": lambda rng, made, args: made + literal((None, {MARK: Ops(made)})) + b"b",
    "BUILD after a call": lambda rng, made, args: (
        made + literal(tuple(args)) + b"R" + literal({"__setstate__": Ops(made)}) + b"b"
    ),
    "BUILD over a class": lambda rng, made, args: (
        b"cargparse\nNamespace\n" + literal(({}, {"__init__": Ops(made)})) + b"b"
    ),
    "BUILD of a class": lambda rng, made, args: (
        b"cargparse\nNamespace\n)\x81" + literal({"__class__": Ops(made)}) + b"b"
    ),
    "BUILD a reducer": lambda rng, made, args: (
        b"cargparse\nNamespace\n)\x81" + literal({"__reduce__": Ops(made)}) + b"b"
    ),
    "a key": lambda rng, made, args: literal({Ops(made): 1}),
    "a persistent id": lambda rng, made, args: made + b"Q",
    "a storage": lambda rng, made, args: (
        b"(" + literal("storage") + made + literal("0") + literal("cpu") + literal(4) + b"tQ"
    ),
    "APPENDS": lambda rng, made, args: (
        b"cargparse\nNamespace\n)\x81" + literal({"extend": Ops(made)}) + b"b(" + literal(1) + b"e"
    ),
    "APPEND": lambda rng, made, args: (
        b"cargparse\nNamespace\n)\x81" + literal({"append": Ops(made)}) + b"b" + literal(1) + b"a"
    ),
    "an ordered dictionary": lambda rng, made, args: (
        b"ccollections\nOrderedDict\n(" + b"(" + made + literal(1) + b"l" + b"ltR"
    ),
    "a tensor": lambda rng, made, args: (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + made + literal(0) + literal((1 << 40,))
        + literal((1,)) + literal(False) + literal({}) + b"tR"
    ),
}  # fmt: skip


def call(rng: random.Random, outside: Path) -> tuple[str, bytes]:
    """Return (kind, opcodes that push one object) of one payload."""
    module, name, args = rng.choice(called.callables(outside))
    if rng.random() < 0.08:  # INST names what it calls itself
        words = b"(" + b"".join(map(literal, args)) + f"i{module}\n{name}\n".encode()
        return "INST", words
    way = rng.choice(sorted(WAYS))
    return way, WAYS[way](rng, named(rng, module, name), args)


def odd(rng: random.Random) -> tuple[str, bytes]:
    """Return (kind, opcodes that push one object): no call, but more than a reader may expect."""
    depth = rng.choice((10, 5_000, 200_000))
    doubling = literal("ha" * 50) + b"".join(b"2\x86" for _ in range(rng.choice((10, 60))))
    kinds: dict[str, bytes] = {
        "nested lists": b"(" * depth + b"l" * depth,
        "nested tuples": b"N" + b"\x85" * depth,
        "doubling tuples": doubling,
        "an extension": rng.choice((b"\x82\x11", b"\x83\x11\0", b"\x84\x11\0\0\0", b"\x82\0")),
        "a persistent line": b"P" + MARK.encode() + b"\n",
        "a far memo": b"Nr" + struct.pack("<I", rng.choice((1 << 20, 1 << 28, (1 << 32) - 1))),
        "a memo that is not there": b"j" + struct.pack("<I", 1 << 30),
        "a long text": b"\x8d" + struct.pack("<Q", rng.choice((1 << 40, 1 << 62, (1 << 64) - 1))),
        "long bytes": b"\x8e" + struct.pack("<Q", rng.choice((1 << 40, 1 << 62))),
        "a negative number of bytes": b"\x8b" + struct.pack("<i", -1) + b"abc",
        "many digits": b"I" + b"9" * 5000 + b"\n",
        "a byte array": b"\x96" + struct.pack("<Q", 1 << 40),
        "a buffer": b"\x97",
        "a frame that is too long": b"\x95" + struct.pack("<Q", 1 << 40) + b"N",
        "a protocol of the future": b"\x80\xff" + b"N",
        "an empty stack": b"000",
        "a set with itself": b"\x8f\x94(h\x00\x90",
        "a list with itself": b"]\x94h\x00a",
        "a number that is none": b"F" + b"x" * rng.choice((1, 300)) + b"\n",
        "half a character": literal("\ud800"),
    }
    kind = rng.choice(sorted(kinds))
    return kind, kinds[kind]


def payload(rng: random.Random, outside: Path) -> tuple[str, bytes]:
    """Return one object's opcodes: mostly a call, else what is odd."""
    return call(rng, outside) if rng.random() < 0.8 else odd(rng)


def planted(rng: random.Random, outside: Path, benign: bytes) -> tuple[str, bytes]:
    """Return (kind, pickle): a payload alone, or somewhere in a pickle that is right otherwise."""
    kind, ops = payload(rng, outside)
    head, body = (benign[:2], benign[2:]) if benign[:1] == b"\x80" else (b"\x80\x02", benign)
    whole = benign[:-1]
    places: dict[str, bytes] = {
        "alone": b"\x80\x04" + ops + b".",
        "without a protocol": ops + b".",
        "before": head + ops + b"0" + body,
        "behind": whole + ops + b"0.",
        "in its place": whole + b"0" + ops + b".",
        "in a dictionary": b"\x80\x04" + literal({"args": Ops(ops), MARK: Ops(ops)}) + b".",
        "in a list": b"\x80\x04" + literal([Ops(ops)]) + b".",
        "as an entry": whole + literal(MARK) + ops + b"s.",
        "as an attribute": whole + literal({MARK: Ops(ops)}) + b"b.",
        "as a slot": whole + literal((None, {MARK: Ops(ops)})) + b"b.",
        "as the state": whole + ops + b"b.",
        "as an argument": whole + ops + b"\x85R.",
        "after its end": benign + ops + b".",
    }
    place = rng.choice(sorted(places))
    return f"{kind}, {place}", places[place]


def damaged(rng: random.Random, benign: bytes) -> tuple[str, bytes]:
    """Return (kind, bytes): the same file cut, with other bytes, or with a part repeated."""
    data = bytearray(benign or b"\0")
    kind = rng.choice(
        ("cut", "bytes", "bytes near the start", "repeated", "empty", "zeros", "tail")
    )
    if kind == "cut":
        del data[rng.randrange(len(data)) :]
    elif kind.startswith("bytes"):
        end = min(len(data), 200) if "start" in kind else len(data)
        for _ in range(rng.choice((1, 1, 3, 20))):
            data[rng.randrange(end)] = rng.randrange(256)
    elif kind == "repeated":
        begin = rng.randrange(len(data))
        data[begin:begin] = data[begin : begin + rng.randrange(200)]
    elif kind == "empty":
        data.clear()
    elif kind == "zeros":
        begin = rng.randrange(len(data))
        size = min(64, len(data) - begin)
        data[begin : begin + size] = bytes(size)
    else:
        data += rng.randbytes(rng.choice((1, 8, 100)))
    return kind, bytes(data)
