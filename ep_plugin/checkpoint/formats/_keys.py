"""What may be a key of a dictionary or in a set: all that a checkpoint has, and nothing slow.

Python hashes a key when it is put there, and compares it with those of the same hash. Who writes a
file can choose values of one hash: integers above 60 bits, tuples, sets. So there may be some
thousands of these in one file, of so many parts: then a file of them takes no longer than others.
"""

from typing import Any

import torch

from ep_plugin.checkpoint.inert import Made, Name, Unsupported

MAX_CHOSEN = 4096  # keys of a file whose hashes can be chosen
MAX_PARTS = 64  # of one such key, nested ones with it
_KEY_BITS = 60  # an integer up to these is its own hash
_PLAIN = frozenset(
    (*(str, bytes, bool, float, type(None), Made, Name), torch.dtype, torch.layout, torch.device)
)
_OF_PARTS = (tuple, frozenset, torch.Size)


class Keys:
    """Checks the keys of one file."""

    def __init__(self) -> None:
        self._chosen = 0

    def check(self, key: Any) -> Any:
        """Return the key; raises Unsupported."""
        kind = type(key)
        if kind in _PLAIN or (kind is int and key.bit_length() <= _KEY_BITS):
            return key
        self._chosen += 1
        if self._chosen > MAX_CHOSEN:
            raise Unsupported(
                f"it has more than {MAX_CHOSEN} keys that are tuples, sets or large integers"
            )
        parts, waiting = 0, [key]
        while waiting:
            part = waiting.pop()
            parts += 1
            inner = part if type(part) in _OF_PARTS else ()
            if parts + len(waiting) + len(inner) > MAX_PARTS:
                raise Unsupported(f"a {kind.__name__} of over {MAX_PARTS} parts is a key in it")
            waiting += inner
            if type(part) not in _PLAIN and type(part) is not int and type(part) not in _OF_PARTS:
                raise Unsupported(f"a {type(part).__name__} is a key in it, or part of one")
        return key
