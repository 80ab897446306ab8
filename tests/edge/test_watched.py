"""How long ranks wait before they speak, beside Megatron's timeouts: refused, said, or shorter."""

import re
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ep_plugin.errors import ConfigError
from ep_plugin.megatron.arguments.watched import ROW, room, watch

MINUTES, SECONDS = "--distributed-timeout-minutes", "--distributed-timeout-seconds-after-init"


def arguments(seconds: int, minutes: int = 10, after: int | None = None) -> Any:
    return SimpleNamespace(
        num_experts=4,
        ep_watch_ranks=seconds,
        distributed_timeout_minutes=minutes,
        distributed_timeout_seconds_after_init=after,
    )


def found(args: Any) -> str | None:
    try:
        return watch(args)
    except ConfigError as error:
        return str(error)


@pytest.mark.parametrize(
    ("typed", "named", "ways"),
    [
        ((500, 10, None), "(500) is longer", [(MINUTES, 12), (ROW.flag, 450)]),
        ((50, 10, 60), "(50) is longer", [(SECONDS, 67), (ROW.flag, 45)]),
        ((500, 10, 60), "(500) is longer", [(MINUTES, 12), (ROW.flag, 45)]),
        ((30, 0, None), "(30) is longer", [(MINUTES, 1)]),
        ((20, 0, None), "is 20 where it is not given, longer", [(MINUTES, 1)]),
        ((20, 10, 4), "is 20 where it is not given, longer", [(SECONDS, 27), (ROW.flag, 3)]),
    ],
)
def test_what_is_longer_than_a_timeout_has_a_way_out(
    typed: tuple[int, int, int | None], named: str, ways: list[tuple[str, int]]
) -> None:
    said = found(arguments(*typed))
    assert said is not None
    assert said.startswith(f"{ROW.flag} {named}")
    advice = re.findall(r"(--[\w-]+) (\d+)", said.partition("; use ")[2])
    assert [(flag, int(value)) for flag, value in advice] == ways


@given(
    seconds=st.integers(0, 2000),
    minutes=st.integers(0, 60),
    after=st.none() | st.integers(0, 2000),
)
def test_ways_out_end_in_a_run_that_speaks_in_time(
    seconds: int, minutes: int, after: int | None
) -> None:
    """None says to type what was typed, and there are no more of them than timeouts."""
    args = arguments(seconds, minutes, after)
    for _ in range(3):
        said = found(args)
        if said is None:
            break
        flag, value = re.findall(r"(--[\w-]+) (\d+)", said.partition("; use ")[2])[0]
        name = flag.removeprefix("--").replace("-", "_")
        assert getattr(args, name) < int(value)
        setattr(args, name, int(value))
    assert said is None
    assert args.ep_watch_ranks <= room(args)


def test_a_default_is_said_and_another_value_is_refused() -> None:
    assert watch(arguments(0, 0)) is None  # never
    assert watch(arguments(20, 0)) is not None
    with pytest.raises(ConfigError, match="longer than three quarters"):
        watch(arguments(21, 0))
    dense = arguments(500, 1)
    dense.num_experts = None  # nobody watches
    assert watch(dense) is None
