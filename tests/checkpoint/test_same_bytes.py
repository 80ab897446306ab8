"""What a conversion writes depends on values alone: not on which objects hold them, or on the
process."""

import argparse
import hashlib
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ep_plugin.checkpoint.formats._iteration import load_object
from ep_plugin.checkpoint.formats._write_pickle import carried_bytes
from ep_plugin.checkpoint.inert import Made, Name
from ep_plugin.cli import main
from tests.commands.test_convert import FLAGS, save_dense

SIGNAL = ("signal", "Signals")


def member(value: int) -> Made:
    return Made(Name(*SIGNAL), (value,), True)


def apart(value: Any) -> Any:
    """An equal value in which no two objects are one."""
    if type(value) is str:
        return "".join([*value, "x"])[:-1] if len(value) > 1 else value
    if type(value) is bytes:
        return bytes(bytearray(value))
    if type(value) in (tuple, list):
        return type(value)([apart(item) for item in value])
    if type(value) is dict:
        return {apart(key): apart(item) for key, item in value.items()}
    if type(value) is argparse.Namespace:
        return argparse.Namespace(**{name: apart(item) for name, item in vars(value).items()})
    return member(value.arguments[0]) if type(value) is Made else value


LEAVES = st.sampled_from([
    *("adam", "a longer word", "", b"some bytes", member(15), torch.float32),
    *(0, 1, True, False, None, 1.0, 0.0, -0.0, 1 << 80),
    *((), (1, "adam"), (1.0, "adam"), (True, "adam"), (0.0,), (-0.0,)),
])  # fmt: skip
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(st.sampled_from(["adam", "lr", "x" * 40]), inner, max_size=3),
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(VALUES)
def test_equal_values_give_equal_bytes(value: Any) -> None:
    args = argparse.Namespace(optimizer="adam", first=value, second=apart(value))
    written = carried_bytes(args)
    assert carried_bytes(apart(args)) == written
    assert carried_bytes(load_object(written)) == written
    read = torch.load(io.BytesIO(written), weights_only=False)
    assert repr(read) == repr(torch.load(io.BytesIO(carried_bytes(args)), weights_only=False))
    assert repr(read.first) == repr(read.second)


@pytest.mark.parametrize("pair", [((1, 2), (True, 2)), ((0.0,), (-0.0,)), ((1,), (1.0,))])
def test_values_that_are_equal_and_not_the_same_stay_apart(pair: tuple[Any, Any]) -> None:
    read = torch.load(io.BytesIO(carried_bytes(pair)), weights_only=False)
    assert repr(read) == repr(pair)


def test_tuples_that_share_parts_are_not_written_out() -> None:
    value: Any = ("x", 1)
    for _ in range(60):
        value = (value, value)
    assert len(carried_bytes(value)) < 10_000


def digests(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def test_a_conversion_in_another_process_gives_the_same_bytes(tmp_path: Path) -> None:
    """Sets have another order there."""
    words = {f"word {number}" for number in range(20)} | {"adam", "local"}
    save_dense(tmp_path / "dense", common_in_file=True, a_set=words, optimizer="adam", other="adam")
    flags = ["convert", "--from", str(tmp_path / "dense"), *FLAGS, "--to"]
    code = "from ep_plugin.cli import main; import sys; sys.exit(main(sys.argv[1:]))"
    there = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    subprocess.run([*there, *flags, str(tmp_path / "there")], env=environment, check=True)
    assert main([*flags, str(tmp_path / "here")]) == 0
    assert digests(tmp_path / "there") == digests(tmp_path / "here")
