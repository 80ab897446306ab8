"""Whatever a file holds, showing it in a message costs next to nothing and takes one short line."""

import argparse
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest

from ep_plugin.checkpoint.inert import Made, Name
from ep_plugin.errors import ConfigError
from ep_plugin.untrusted import shown

KINDS: dict[str, Callable[[Any], Any]] = {
    "list": lambda inner: [inner, inner],
    "tuple": lambda inner: (inner, inner),
    "dict": lambda inner: {"a": inner, "b": inner},
    "OrderedDict": lambda inner: OrderedDict(a=inner, b=inner),
    "Namespace": lambda inner: argparse.Namespace(a=inner, b=inner),
}


class Counted:
    """Counts how often it is looked at."""

    looks = 0

    def __repr__(self) -> str:
        Counted.looks += 1
        return "Counted"


@pytest.mark.parametrize("kind", KINDS)
def test_shared_values_are_not_spelled_out(kind: str) -> None:
    """A few hundred bytes of a pickle can hold a list of 2**16 items, and of 2**100."""
    for depth in (2, 16):
        value: Any = Counted()
        for _ in range(depth):
            value = KINDS[kind](value)
        Counted.looks = 0
        text = str(ConfigError(shown(value)))
        assert Counted.looks <= 8
        assert len(text) < 120
        assert "\n" not in text


@pytest.mark.parametrize("long", [b"x" * 10**6, bytearray(10**6), "x" * 10**6, [0] * 10**6])
def test_long_values_are_cut(long: Any) -> None:
    assert len(shown(long)) < 100


def test_what_a_pickle_names_and_what_looks_like_a_setting() -> None:
    made = Made(Name("os", "system"), ("rm",), called=True)
    assert shown(made) == "an object of os.system (ep_plugin.checkpoint.inert.Made)"
    assert str(ConfigError(f"{shown('<topk>')}; use <topk=2>")) == "'<topk>'; use topk=2"
