"""Pickles of others, read without doing what they say.

A pickle is a program: it names functions and has them called. Here nothing is imported and nothing
is called. A name becomes a `Name`, a call or a new object becomes a `Made` that remembers what was
asked for, a reference to a tensor's storage a `Persistent`. What of these becomes a real value is
decided afterwards, from exact lists (`_values.py`, `_metadata.py`).

Every length is held against the bytes that are there before anything is allocated, and the number
of objects is bounded by that of the bytes. Opcodes that `pickle.dump` of protocol 2 and later does
not write are refused.
"""

import struct
from typing import Any

from ep_plugin.checkpoint.formats._keys import Keys
from ep_plugin.checkpoint.inert import Made, Name, OldOpcode, Persistent, Unreadable, Unsupported
from ep_plugin.untrusted import cut

NAME_LENGTH = 256  # of a module or a class
MAX_INT_BYTES = 513  # 4096 bits and a sign
FREE_OBJECTS, BYTES_PER_OBJECT = 1 << 16, 6  # a file may make so many, and one for so many bytes

_U2, _U4, _U8 = struct.Struct("<H"), struct.Struct("<I"), struct.Struct("<Q")
_I4, _F8 = struct.Struct("<i"), struct.Struct(">d")
_OLD = frozenset(b"FILSTUVPdlpgio")  # INT, STRING, UNICODE, PERSID, DICT, PUT and their kin


Names = frozenset[tuple[str, str]]


def read_pickle(data: bytes, allowed: Names | None = None) -> Any:
    """Return what a pickle holds, with `Name`, `Made` and `Persistent` for all that is not plain.

    `allowed`: the only names that it may say. Raises Unreadable.
    """
    try:
        return _run(data, allowed)
    except (IndexError, struct.error) as error:
        raise Unreadable("it ends too early, or takes more than it put there") from error
    except UnicodeError as error:
        raise Unreadable("it holds text that is not UTF-8") from error
    except (MemoryError, OverflowError) as error:
        raise Unreadable("it asks for more memory than there is") from error


def _name(
    names: dict[tuple[str, str], Name], allowed: Names | None, module: Any, name: Any
) -> Name:
    for word in (module, name):
        if not isinstance(word, str):
            raise Unreadable("a name in it is no text")
        if len(word) > NAME_LENGTH:
            raise Unreadable(f"a name in it has {len(word)} characters, {cut(word, 40)}")
    if allowed is not None and (module, name) not in allowed:
        raise Unreadable(f"it names {Name(module, name)}, which no file of its kind does")
    return names.setdefault((module, name), Name(module, name))


def _slice(data: bytes, at: int, length: int) -> bytes:
    if length > len(data) - at:
        raise Unreadable(f"it says that {length} bytes follow where {len(data) - at} do")
    return data[at : at + length]


def _run(data: bytes, allowed: Names | None) -> Any:
    """The machine. One loop and no table of functions: a large model has 30 million opcodes."""
    at, end = 0, len(data)
    stack: list[Any] = []
    marks: list[list[Any]] = []
    memo: list[Any] = []
    sparse: dict[int, Any] = {}  # where numbers of the memo do not come in order
    names: dict[tuple[str, str], Name] = {}
    keys = Keys()
    left = FREE_OBJECTS + end // BYTES_PER_OBJECT
    push, remember = stack.append, memo.append

    while True:
        op = data[at]
        at += 1
        if op == 0x94:  # MEMOIZE
            remember(stack[-1])
        elif op == 0x6A:  # LONG_BINGET
            (number,) = _U4.unpack_from(data, at)
            at += 4
            push(memo[number] if number < len(memo) else _get(sparse, number))
        elif op == 0x68:  # BINGET
            number = data[at]
            at += 1
            push(memo[number] if number < len(memo) else _get(sparse, number))
        elif op == 0x4B:  # BININT1
            push(data[at])
            at += 1
        elif op == 0x28:  # MARK
            marks.append(stack)
            stack = []
            push = stack.append
            left -= 1
        elif op == 0x29:  # EMPTY_TUPLE
            push(())
        elif op == 0x71 or op == 0x72:  # BINPUT, LONG_BINPUT
            if op == 0x71:
                number = data[at]
                at += 1
            else:
                (number,) = _U4.unpack_from(data, at)
                at += 4
            if number == len(memo):
                remember(stack[-1])
            elif number < len(memo):
                memo[number] = stack[-1]
            else:
                sparse[number] = stack[-1]
        elif op == 0x58:  # BINUNICODE
            (length,) = _U4.unpack_from(data, at)
            push(str(_slice(data, at + 4, length), "utf-8", "surrogatepass"))
            at += 4 + length
        elif op == 0x8C:  # SHORT_BINUNICODE
            length = data[at]
            push(str(_slice(data, at + 1, length), "utf-8", "surrogatepass"))
            at += 1 + length
        elif op == 0x81 or op == 0x52:  # NEWOBJ, REDUCE
            arguments, kind = stack.pop(), stack.pop()
            if type(kind) is not Name or type(arguments) is not tuple:
                raise Unreadable("it makes an object of something that is no class")
            push(Made(kind, arguments, op == 0x52))
            left -= 1
        elif op == 0x62:  # BUILD
            state, made = stack.pop(), stack[-1]
            if type(made) is not Made or made.state is not None:
                raise Unreadable("it sets the attributes of something that has none")
            made.state = state
        elif op == 0x7D:  # EMPTY_DICT
            push({})
            left -= 1
        elif op == 0x75 or op == 0x73:  # SETITEMS, SETITEM
            if op == 0x75:
                found, stack = stack, marks.pop()
                push = stack.append
            else:
                found = stack[-2:]
                del stack[-2:]
            target = stack[-1]
            if len(found) % 2:
                raise Unreadable("a key in it has no value")
            if type(target) is dict:
                for number in range(0, len(found), 2):
                    key = found[number]
                    if type(key) is not str:
                        keys.check(key)
                    target[key] = found[number + 1]
            elif type(target) is Made:
                pairs = [(keys.check(found[n]), found[n + 1]) for n in range(0, len(found), 2)]
                left -= len(pairs)
                target.items = _more(target, pairs)
            else:
                raise Unreadable("it sets an item of something that has none")
        elif op == 0x85:  # TUPLE1
            stack[-1] = (stack[-1],)
            left -= 1
        elif op == 0x86:  # TUPLE2
            stack[-2:] = [(stack[-2], stack[-1])]
            left -= 1
        elif op == 0x87:  # TUPLE3
            stack[-3:] = [(stack[-3], stack[-2], stack[-1])]
            left -= 1
        elif op == 0x74:  # TUPLE
            whole, stack = tuple(stack), marks.pop()
            push = stack.append
            push(whole)
            left -= 1
        elif op == 0x4E:  # NONE
            push(None)
        elif op == 0x88:  # NEWTRUE
            push(True)
        elif op == 0x89:  # NEWFALSE
            push(False)
        elif op == 0x4D:  # BININT2
            push(_U2.unpack_from(data, at)[0])
            at += 2
        elif op == 0x4A:  # BININT
            push(_I4.unpack_from(data, at)[0])
            at += 4
        elif op == 0x47:  # BINFLOAT
            push(_F8.unpack_from(data, at)[0])
            at += 8
        elif op == 0x8A:  # LONG1
            length = data[at]
            push(int.from_bytes(_slice(data, at + 1, length), "little", signed=True))
            at += 1 + length
        elif op == 0x5D:  # EMPTY_LIST
            push([])
            left -= 1
        elif op == 0x65 or op == 0x61:  # APPENDS, APPEND
            if op == 0x65:
                found, stack = stack, marks.pop()
                push = stack.append
            else:
                found = [stack.pop()]
            if type(stack[-1]) is not list:
                raise Unreadable("it appends to something that is no list")
            stack[-1].extend(found)
        elif op == 0x63:  # GLOBAL
            middle = _line(data, at)
            last = _line(data, middle + 1)
            push(
                _name(
                    names,
                    allowed,
                    str(data[at:middle], "utf-8"),
                    str(data[middle + 1 : last], "utf-8"),
                )
            )
            at = last + 1
        elif op == 0x93:  # STACK_GLOBAL
            name, module = stack.pop(), stack.pop()
            push(_name(names, allowed, module, name))
        elif op == 0x51:  # BINPERSID
            stack[-1] = Persistent(stack[-1])
            left -= 1
        elif op == 0x42 or op == 0x8E or op == 0x43:  # BINBYTES, BINBYTES8, SHORT_BINBYTES
            length, width = _length(data, at, {0x42: 4, 0x8E: 8, 0x43: 1}[op])
            push(_slice(data, at + width, length))
            at += width + length
        elif op == 0x8D:  # BINUNICODE8
            length, width = _length(data, at, 8)
            push(str(_slice(data, at + width, length), "utf-8", "surrogatepass"))
            at += width + length
        elif op == 0x96:  # BYTEARRAY8
            length, width = _length(data, at, 8)
            push(bytearray(_slice(data, at + width, length)))
            at += width + length
        elif op == 0x8B:  # LONG4
            (length,) = _I4.unpack_from(data, at)
            if length < 0:
                raise Unreadable("it says that less than nothing follows")
            if length > MAX_INT_BYTES:
                most = 8 * MAX_INT_BYTES - 8
                raise Unsupported(
                    f"it holds an integer of {length} bytes, of more than {most} bits"
                )
            push(int.from_bytes(_slice(data, at + 4, length), "little", signed=True))
            at += 4 + length
        elif op == 0x8F:  # EMPTY_SET
            push(set())
            left -= 4
        elif op == 0x90:  # ADDITEMS
            found, stack = stack, marks.pop()
            push = stack.append
            if type(stack[-1]) is not set:
                raise Unreadable("it adds to something that is no set")
            stack[-1].update(keys.check(value) for value in found)
        elif op == 0x91:  # FROZENSET
            found, stack = stack, marks.pop()
            push = stack.append
            push(frozenset(keys.check(value) for value in found))
            left -= 4
        elif op == 0x30:  # POP
            if stack:
                stack.pop()
            else:
                stack = marks.pop()
                push = stack.append
        elif op == 0x31:  # POP_MARK
            stack = marks.pop()
            push = stack.append
        elif op == 0x80 and data[at] <= 5:  # PROTO
            at += 1
        elif op == 0x95:  # FRAME
            length, width = _length(data, at, 8)
            if length > end - at - width:
                raise Unreadable(f"it says that {length} bytes follow where {end - at - width} do")
            at += width
        elif op == 0x2E:  # STOP
            if len(stack) != 1 or marks or at != end:
                raise Unreadable("something is left over at its end")
            return stack[0]
        elif op in _OLD:
            raise OldOpcode(
                f"byte {at - 1} of it, {op:#04x}, is an opcode of pickle protocol 0 or 1 or of "
                "Python 2"
            )
        else:
            raise Unreadable(f"byte {at - 1} of it, {op:#04x}, is nothing that is saved today")
        if left < 0:
            raise Unsupported("it makes more objects than its size explains")


def _line(data: bytes, at: int) -> int:
    """Return where the line that begins at `at` ends."""
    found = data.find(b"\n", at, at + 4 * NAME_LENGTH)
    if found < 0:
        raise Unreadable(f"a name in it does not end, {cut(repr(data[at : at + 40]))}")
    return found


def _get(sparse: dict[int, Any], number: int) -> Any:
    if number not in sparse:
        raise Unreadable(f"it takes object {number}, which it has not made")
    return sparse[number]


def _more(made: Made, pairs: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    if made.items is None:
        return pairs
    made.items.extend(pairs)
    return made.items


def _length(data: bytes, at: int, width: int) -> tuple[int, int]:
    """Return a length and how many bytes it is written in."""
    raw = _slice(data, at, width)
    return int.from_bytes(raw, "little"), width
