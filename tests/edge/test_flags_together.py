"""Two names of one setting: what is accepted means what each says, and the rest is refused."""

from collections.abc import Iterator
from typing import Any

import pytest
from command_line import Accepted, read
from flag_values import given, parser, values
from loop import NEWEST

from ep_plugin.megatron.arguments.table import TABLE, Argument
from ep_plugin.megatron.arguments.together import OF_DENSE_BLOCKS
from ep_plugin.presets import load, presets

pytestmark = [pytest.mark.megatron, pytest.mark.newest]
if not NEWEST:
    pytest.skip("the flags of Megatron 0.19", allow_module_level=True)
COUSINS = [row for row in TABLE if row.cousin is not None and row.name not in OF_DENSE_BLOCKS]
GROUPS = "--ep-group-tokens 8 --ep-eval-capacity-factor 1"
BESIDE = {  # what a row needs to act
    "drop_policy": "--ep-eval-capacity-factor 1",
    "normalize": "--ep-eval-capacity-factor 1",
    "aux_loss_scope": f"--ep-aux-loss-coeff 0.5 {GROUPS}",
}
NUMBERS = ("0.5", "1.0")  # where a flag has no choices


def theirs(row: Argument) -> list[list[str]]:
    """Return the ways to type Megatron's flag."""
    action = parser()._option_string_actions[str(row.cousin)]
    if action.nargs == 0:
        return [[str(row.cousin)]]
    return [[str(row.cousin), str(value)] for value in action.choices or NUMBERS]


def ours(row: Argument) -> list[list[str]]:
    """Return the ways to type our flag."""
    found: list[Any] = [*values(row), row.field_default, *NUMBERS] if row.legal is None else []
    legal = [value for value in row.legal or found if value is not None]
    bools = [True, False] if row.hint is bool else legal
    numbers = [value for value in bools if row.hint is bool or row.legal or 0 < float(value) <= 1]
    return [given(row.name, value) for value in dict.fromkeys(numbers)]


def name_of(part: Any) -> str:
    return part.name if isinstance(part, Argument) else str(part)


PAIRS = [(row, one, other) for row in COUSINS for one in ours(row) for other in theirs(row)]


@pytest.mark.parametrize(("row", "one", "other"), PAIRS, ids=name_of)
def test_what_is_accepted_means_what_each_says(
    row: Argument, one: list[str], other: list[str]
) -> None:
    beside = BESIDE.get(row.name, "").split()
    both, *alone = (read(*beside, *flags) for flags in ([*one, *other], one, other))
    if isinstance(both, Accepted):
        ours_alone, theirs_alone = (getattr(way, "config", None) for way in alone)
        assert ours_alone == both.config
        refines = row.name in ("normalize", "aux_loss_scope")  # after_drop, group: not Megatron's
        assert refines or theirs_alone == both.config
    elif all(isinstance(way, Accepted) for way in alone):
        assert "contradict" in both
        assert one[0] in both
        assert other[0] in both


def of_presets() -> Iterator[tuple[str, Argument, list[str]]]:
    """Yield presets with a setting that has two names, and another value of each name."""
    for name in presets():
        preset = load(name)
        for row in COUSINS:
            part, _, field = str(row.feeds).partition(".")
            if part != "routing" or not any(preset.model.experts) or preset.router != "topk":
                continue
            value = getattr(preset.routing, field)
            if value == row.field_default:
                continue
            for flags in (*ours(row), *theirs(row)):
                yield name, row, flags


@pytest.mark.parametrize(("preset", "row", "flags"), list(of_presets()), ids=name_of)
def test_what_is_typed_takes_the_place_of_a_preset_s(
    preset: str, row: Argument, flags: list[str]
) -> None:
    plain = ["--ep-preset", preset, "--expert-model-parallel-size", "1"]
    found = read(*plain, *flags)
    if isinstance(found, str):
        assert "contradict" not in found
        return
    said = getattr(found.config.routing, row.name)
    switch = len(flags) == 1  # --moe-router-pre-softmax
    off = flags[-1] == "none"
    assert switch or flags[-1] in (str(said), row.cousin_values.get(str(said))) or off
