"""What honest files may hold is read as it was written, or refused by name."""

import io
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ep_plugin.checkpoint.formats._iteration import load_common, load_object
from ep_plugin.checkpoint.formats._keys import MAX_CHOSEN, MAX_PARTS
from ep_plugin.checkpoint.formats._pickle import read_pickle
from ep_plugin.checkpoint.formats._values import Values
from ep_plugin.checkpoint.inert import Unsupported
from ep_plugin.checkpoint.tensors import Damaged

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(1 << 4096) + 1, (1 << 4096) - 1),
    st.floats(),
    st.text(max_size=20),
    st.binary(max_size=20),
)
keys = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3).map(tuple) | st.frozensets(inner, max_size=3),
    max_leaves=8,
)
values = st.recursive(
    scalars | st.binary(max_size=20).map(bytearray),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(keys, inner, max_size=4),
        st.sets(keys, max_size=4),
        st.frozensets(keys, max_size=4),
    ),
    max_leaves=25,
)


def text_of(value: Any) -> Any:
    """Return what equal values have in common: nan too, and types of keys, and the sign of 0."""
    if isinstance(value, dict):
        return "dict", sorted(((text_of(k), text_of(v)) for k, v in value.items()), key=repr)
    if isinstance(value, (set, frozenset)):
        return type(value).__name__, sorted((text_of(item) for item in value), key=repr)
    if isinstance(value, (list, tuple)):
        return type(value).__name__, [text_of(item) for item in value]
    return type(value).__name__, repr(value)


def read(content: bytes) -> Any:
    return Values(None).build(read_pickle(content))


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(values)
def test_values_read_as_they_were_written(value: Any) -> None:
    for protocol in (2, 3, 4, 5):
        content = pickle.dumps(value, protocol)
        assert text_of(read(content)) == text_of(pickle.loads(content)) == text_of(value), protocol


def test_states_of_random_numbers_are_read() -> None:
    shared = (1, (2, 3))
    state = {
        "python": random.Random(1 << 64).getstate(),
        "torch": torch.get_rng_state(),
        "seed": (1 << 64) - 1,
        "consumed_samples": {shared: 1, (shared, 4): 2, float("nan"): 3, 1 << 64: 4},
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    found = load_object(buffer.getvalue())
    assert torch.equal(found.pop("torch"), state.pop("torch"))  # type: ignore[call-overload]
    assert text_of(found) == text_of(state)


def deep(depth: int) -> Any:
    value: Any = ()
    for _ in range(depth):
        value = (value, value)
    return value


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


REFUSED: dict[str, tuple[Any, str]] = {
    "integer": (1 << 5000, "an integer of 626 bytes"),
    "key": ({tuple(range(MAX_PARTS)): 0}, "a tuple of over 64 parts is a key"),
    "set": ({frozenset(range(MAX_PARTS)): 0}, "a frozenset of over 64 parts is a key"),
    "keys of one hash": ({n * ((1 << 61) - 1): 0 for n in range(10, 6000)}, "more than 4096 keys"),
    "tuples": ({(n,) for n in range(MAX_CHOSEN + 1)}, "more than 4096 keys"),
    "a key of one hash": ({deep(12): 0}, "a tuple of over 64 parts is a key"),
    "depth": (nested(200), "nested more than 100 deep"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("protocol", [2, 5])
def test_what_is_beyond_bounds_is_named_and_a_copy_is_not_advised(name: str, protocol: int) -> None:
    value, words = REFUSED[name]
    with pytest.raises(Unsupported, match=words):
        read(pickle.dumps(value, protocol))
    buffer = io.BytesIO()
    torch.save({"args": value}, buffer)
    with pytest.raises(Damaged, match=words) as refused:
        load_common(buffer.getvalue(), Path("/run/iter_0000001"))
    assert "/run/iter_0000001" in str(refused.value)
    assert "save the checkpoint without that" in str(refused.value)
    assert "copy" not in str(refused.value)


def test_a_key_of_many_parts_that_one_object_stands_for_is_not_hashed() -> None:
    """A tuple of itself twice, 60 times over: hashing it would not end."""
    content = b"\x80\x02})" + b"q\x00h\x00\x86" * 60 + b"Ns."
    with pytest.raises(Unsupported, match="over 64 parts"):
        read(content)


@pytest.mark.parametrize(
    "key",
    [
        b"ccollections\nOrderedDict\n)R",
        b"cargparse\nNamespace\n)\x81",
        b"ccollections\nOrderedDict\n)R\x85",
        b"c__builtin__\nset\n]\x85R",
        b"c__builtin__\nbytearray\n)R",
    ],
)
def test_a_key_that_becomes_something_without_a_hash_is_named(key: bytes) -> None:
    for content in (b"\x80\x02}" + key + b"Ns.", b"\x80\x04\x8f(" + key + b"\x90."):
        with pytest.raises(Unsupported, match="is a key in it"):
            read(content)
