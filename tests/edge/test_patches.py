"""The patcher: all or nothing, newest undone first, and what others did after us is theirs."""

import functools
import os
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from ep_plugin.megatron.seams.patches import Patches
from ep_plugin.megatron.seams.touchpoints import find_owner

WHY = "a test looks at it"


class Base:
    def inherited(self) -> str:
        return "inherited"

    @classmethod
    def made(cls) -> str:
        return f"made {cls.__name__}"


class Owner(Base):
    value = 1

    def method(self, x: int = 0) -> tuple[str, int]:
        return "method", x

    @staticmethod
    def static(x: int) -> int:
        return x

    @classmethod
    def of_class(cls, x: int) -> tuple[str, int]:
        return cls.__name__, x

    @property
    def number(self) -> int:
        return 5


class Below(Owner): ...


def function(x: int = 0) -> tuple[str, int]:
    return "function", x


def ours(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return "ours", original(*args, **kwargs)


def theirs(original: Callable[..., Any]) -> Callable[..., Any]:
    """What another package does: it keeps what it found, and copies its attributes."""

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return "theirs", original(*args, **kwargs)

    return wrapped


@pytest.fixture
def other(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A module of other people: function, Owner and Below, all fresh."""
    module: Any = types.ModuleType("other_people")
    module.Base = type("Base", (), dict(vars(Base)))
    module.Owner = type("Owner", (module.Base,), dict(vars(Owner)))
    module.Below = type("Below", (module.Owner,), {})
    module.function, module.constant = function, 3
    monkeypatch.setitem(sys.modules, "other_people", module)
    found: types.ModuleType = module
    return found


def at(name: str) -> str:
    return f"other_people:{name}"


def everything(module: types.ModuleType) -> dict[tuple[str, str], Any]:
    """Return what stands in the module and in each of its classes."""
    owners = {"": module, **{k: v for k, v in vars(module).items() if isinstance(v, type)}}
    return {(where, k): v for where, owner in owners.items() for k, v in vars(owner).items()}


def assert_same(module: types.ModuleType, before: dict[tuple[str, str], Any]) -> None:
    after = everything(module)
    assert after.keys() == before.keys()
    assert [key for key in before if after[key] is not before[key]] == []


def test_nothing_is_changed_before_apply_and_all_is_put_back(other: Any) -> None:
    before = everything(other)
    patches = Patches()
    patches.replace(at("constant"), 4, WHY)
    patches.replace(at("Owner.value"), 2, "the value is read there")
    patches.wrap(at("function"), ours, WHY)
    assert_same(other, before)
    assert not patches.active
    patches.apply()
    assert patches.active
    assert (other.constant, other.Owner.value, other.Below.value) == (4, 2, 2)
    assert other.function(7) == ("ours", ("function", 7))
    assert other.function.__name__ == "function"
    assert patches.verify() == []
    assert patches.table() == [
        (at("constant"), WHY),
        (at("Owner.value"), "the value is read there"),
        (at("function"), WHY),
    ]
    assert patches.undo() == []
    assert_same(other, before)
    assert not patches.active
    assert patches.undo() == []


def test_methods_of_every_kind_are_wrapped_as_what_they_are(other: Any) -> None:
    before = everything(other)
    patches = Patches()
    for name in ("method", "static", "of_class", "inherited", "made"):
        patches.wrap(at(f"Owner.{name}"), ours, WHY)
    patches.apply()
    below = other.Below()
    assert below.method(3) == ("ours", ("method", 3))
    assert other.Owner.static(3) == below.static(3) == ("ours", 3)
    assert other.Owner.of_class(3) == ("ours", ("Owner", 3))
    assert other.Below.of_class(3) == ("ours", ("Below", 3))
    assert below.inherited() == ("ours", "inherited")
    assert other.Below.made() == ("ours", "made Below")
    assert other.Base().inherited() == "inherited"
    assert other.Base.made() == "made Base"
    assert patches.undo() == []
    assert_same(other, before)
    assert "inherited" not in vars(other.Owner)
    assert below.inherited() == "inherited"


def test_an_attribute_that_was_not_there_is_deleted(other: Any) -> None:
    before = everything(other)
    patches = Patches()
    patches.replace(at("added"), 1, WHY)
    patches.replace(at("Below.value"), 8, WHY)
    patches.apply()
    assert (other.added, other.Below.value, other.Owner.value) == (1, 8, 1)
    patches.undo()
    assert_same(other, before)
    assert other.Below.value == 1


def test_one_place_is_changed_more_than_once(other: Any) -> None:
    before = everything(other)
    patches = Patches()
    patches.wrap(at("function"), ours, WHY)
    patches.wrap(at("function"), lambda original, x: ("outer", original(x)), WHY)
    patches.apply()
    assert other.function(1) == ("outer", ("ours", ("function", 1)))
    assert patches.verify() == []
    assert patches.undo() == []
    assert_same(other, before)


def test_apply_twice_makes_what_was_noted_since(other: Any) -> None:
    before = everything(other)
    patches = Patches()
    patches.replace(at("constant"), 4, WHY)
    patches.apply()
    first = everything(other)
    patches.apply()
    assert_same(other, first)
    patches.wrap(at("function"), ours, WHY)
    patches.apply()
    assert other.function(1) == ("ours", ("function", 1))
    assert [place for place, _ in patches.table()] == [at("constant"), at("function")]
    assert patches.undo() == []
    assert_same(other, before)


def test_an_error_in_a_later_apply_undoes_the_earlier_one_too(other: Any) -> None:
    before = everything(other)
    patches = Patches()
    patches.replace(at("constant"), 4, WHY)
    patches.apply()
    patches.wrap(at("gone"), ours, WHY)
    with pytest.raises(AttributeError, match="gone"):
        patches.apply()
    assert_same(other, before)
    assert not patches.active
    assert patches.table() == []


@pytest.mark.parametrize(
    ("place", "error", "text"),
    [
        ("no_such_module:function", ImportError, "no_such_module"),
        (at("Gone.method"), AttributeError, "Gone"),
        (at("Owner.gone"), AttributeError, "gone"),
        (at("Owner.number"), TypeError, "other_people:Owner.number is no function; use replace"),
        (at("constant"), TypeError, "other_people:constant is no function; use replace"),
    ],
)
def test_every_place_is_looked_up_before_any_is_changed(
    place: str, error: type[Exception], text: str, other: Any
) -> None:
    """The change before the wrong one would be seen: its owner keeps a list of what it is given."""
    given: list[str] = []

    class Watched(types.ModuleType):
        def __setattr__(self, name: str, value: Any) -> None:
            given.append(name)
            super().__setattr__(name, value)

    other.__class__ = Watched
    patches = Patches()
    patches.replace(at("constant"), 4, WHY)
    patches.wrap(place, ours, WHY)
    with pytest.raises(error, match=text):
        patches.apply()
    assert given == []
    patches.replace(at("constant"), 4, WHY)  # what failed is forgotten
    patches.apply()
    assert given == ["constant"]


def test_an_owner_without_attributes_of_its_own_is_refused_first(other: Any) -> None:
    other.slots = (1, 2)
    before = everything(other)
    patches = Patches()
    patches.replace(at("constant"), 4, WHY)
    patches.replace(at("slots.count"), ours, WHY)
    with pytest.raises(TypeError):
        patches.apply()
    assert_same(other, before)


def test_an_error_in_the_middle_undoes_what_was_done(
    other: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OTHER_PEOPLES", raising=False)
    before, events = everything(other), list[str]()

    @contextmanager
    def context() -> Iterator[None]:
        events.append("in")
        yield
        events.append("out")

    @contextmanager
    def failing() -> Iterator[None]:
        raise KeyboardInterrupt
        yield

    patches = Patches()
    patches.wrap(at("Owner.inherited"), ours, WHY)
    patches.environment("OTHER_PEOPLES", "1", WHY)
    patches.enter(context(), WHY)
    patches.enter(failing(), WHY)
    patches.replace(at("constant"), 4, WHY)
    with pytest.raises(KeyboardInterrupt):
        patches.apply()
    assert_same(other, before)
    assert events == ["in", "out"]
    assert "OTHER_PEOPLES" not in os.environ
    assert not patches.active


@pytest.mark.parametrize("name", ["function", "Owner.method", "Owner.static", "Below.method"])
def test_another_s_wrapper_on_top_stays_and_ours_below_it_sleeps(name: str, other: Any) -> None:
    owner, last = find_owner(at(name))

    def called() -> Any:
        return getattr(owner() if isinstance(owner, type) else owner, last)(1)

    plain = called()
    patches = Patches()
    patches.wrap(at(name), ours, WHY)
    patches.apply()
    on_top: Any = theirs(getattr(owner, last))
    on_top = staticmethod(on_top) if last == "static" else on_top
    setattr(owner, last, on_top)
    assert called() == ("theirs", ("ours", plain))
    said = f"{at(name)} is no longer what ep_plugin put there, it is {on_top!r}"
    assert patches.verify() == [said]
    assert patches.undo() == [said]
    assert vars(owner)[last] is on_top
    assert called() == ("theirs", plain)
    again = Patches()  # ours is called once, not twice
    again.wrap(at(name), ours, WHY)
    again.apply()
    assert called() == ("ours", ("theirs", plain))
    assert again.undo() == []
    assert vars(owner)[last] is on_top


def test_another_s_wrapper_below_ours_is_put_back(other: Any) -> None:
    other.function = below = theirs(other.function)
    patches = Patches()
    patches.wrap(at("function"), ours, WHY)
    patches.apply()
    assert other.function(1) == ("ours", ("theirs", ("function", 1)))
    assert patches.undo() == []
    assert other.function is below


def test_what_another_replaced_between_two_applies_is_put_back_and_named(other: Any) -> None:
    patches = Patches()
    patches.wrap(at("function"), ours, WHY)
    patches.apply()
    other.function = between = theirs(other.function)
    patches.wrap(at("function"), ours, WHY)
    patches.apply()
    assert patches.verify() == []
    assert len(patches.undo()) == 1
    assert other.function is between
    assert other.function(1) == ("theirs", ("function", 1))


def test_what_another_deleted_stays_deleted(other: Any) -> None:
    patches = Patches()
    patches.replace(at("constant"), 4, WHY)
    patches.wrap(at("Owner.inherited"), ours, WHY)
    patches.apply()
    del other.constant, other.Owner.inherited
    gone = "is no longer what ep_plugin put there, it is gone"
    said = [f"{at(name)} {gone}" for name in ("constant", "Owner.inherited")]
    assert patches.verify() == said
    assert patches.undo() == said[::-1]
    assert not hasattr(other, "constant")
    assert other.Owner().inherited() == "inherited"


def test_a_variable_is_set_only_where_it_is_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SET", "theirs")
    for name in ("UNSET", "CHANGED", "DELETED"):
        monkeypatch.delenv(name, raising=False)
    patches = Patches()
    for name in ("SET", "UNSET", "CHANGED", "DELETED"):
        patches.environment(name, "ours", WHY)
    patches.apply()
    assert [os.environ[name] for name in ("SET", "UNSET", "CHANGED")] == ["theirs", "ours", "ours"]
    monkeypatch.setenv("SET", "theirs again")
    monkeypatch.setenv("CHANGED", "theirs")
    del os.environ["DELETED"]
    said = [
        "CHANGED is no longer what ep_plugin put there, it is 'theirs'",
        "DELETED is no longer what ep_plugin put there, it is gone",
    ]
    assert patches.verify() == said
    assert patches.undo() == said[::-1]
    assert (os.environ["SET"], os.environ["CHANGED"]) == ("theirs again", "theirs")
    assert "UNSET" not in os.environ


def test_contexts_are_left_newest_first() -> None:
    events: list[str] = []

    @contextmanager
    def context(name: str) -> Iterator[None]:
        events.append(f"into {name}")
        yield
        events.append(f"out of {name}")

    patches = Patches()
    patches.enter(context("a"), WHY)
    patches.enter(context("b"), WHY)
    assert events == []
    patches.apply()
    patches.undo()
    assert events == ["into a", "into b", "out of b", "out of a"]


AT_EXIT = """
import sys
from ep_plugin.megatron.seams.patches import Patches
patches = Patches()
patches.at_exit(lambda: print("called"), "a test looks at it")
print("noted")
if "apply" in sys.argv: patches.apply()
if "undo" in sys.argv: patches.undo()
"""


@pytest.mark.parametrize(
    ("steps", "said"),
    [((), "noted\n"), (("apply",), "noted\ncalled\n"), (("apply", "undo"), "noted\n")],
)
def test_a_function_is_called_at_the_end_unless_undone(steps: tuple[str, ...], said: str) -> None:
    command = [sys.executable, "-c", AT_EXIT, *steps]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == said
