"""Settings of every kind, as hypothesis strategies: values of any type for any field.

`cases()` draws a class and its arguments; `calls()` a function and its arguments. Both are made
from the annotations of `ep_plugin`, so that a new field or function takes part by itself. `run`
makes what was drawn: it may raise ConfigError and nothing else.
"""

import ast
import enum
import functools
import math
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from decimal import Decimal
from fractions import Fraction
from importlib import import_module
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch
from hypothesis import strategies as st

from ep_plugin.errors import ConfigError
from ep_plugin.moe.groups import ExpertGroups, node_size
from ep_plugin.moe.layer import MoELayer
from ep_plugin.presets import load
from ep_plugin.registry import HOME, resolve
from ep_plugin.typed import Named, Within

ROOT = Path(__file__).parents[2] / "ep_plugin"
Case = tuple[Callable[..., Any], dict[str, Any]]


def settings_classes() -> list[type]:
    """Return every class below ep_plugin that derives from Typed."""
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and "Typed" in map(ast.unparse, node.bases):
                name = ".".join(path.relative_to(ROOT.parent).with_suffix("").parts)
                found.append(getattr(import_module(name.removesuffix(".__init__")), node.name))
    return found


SETTINGS = settings_classes()


class Word(enum.StrEnum):
    TOPK = "topk"


class Number(enum.IntEnum):
    TWO = 2


class Unprintable:
    """No value shows itself worse."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")


class TwoLines:
    def __repr__(self) -> str:
        return "two\nlines <topk> " + "x" * 5000


ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, 2, -1, 7, 10**30, -(10**30), 10**5000, 2**31, 2**62, 10**9),
    *(0.0, 1.0, 0.5, -0.0, 3.5, math.nan, math.inf, -math.inf, 1e308, 5e-324, 2 + 3j),
    *("", "x", "2", "1.5", "true", "None", "topk", "a.b", ".", "..", "os.path", "a\nb", "a\0b"),
    *("\ud800", "é", "<topk>", "{x}", "%s", "x" * 5000, "../x", "--ep-topk", "ep_plugin.router."),
    *(
        b"",
        b"x",
        bytearray(b"x"),
        [],
        [1],
        [[1]],
        (),
        (1,),
        ("sequence", 0.1),
        (("sequence", 0.1),),
    ),
    *((("sequence", "x"),), [("sequence", 0.1)], (("nope", 0.1),), (("sequence", math.nan),)),
    *({}, {"topk": 2}, {"topk": "2"}, {"nope": 1}, {1: 1}, {"tp": 1}, {"tp": -1}, {1}, frozenset()),
    *(
        object(),
        object,
        int,
        len,
        lambda: True,
        lambda: 1 / 0,
        print,
        ...,
        NotImplemented,
        range(3),
    ),
    *(Decimal("0.5"), Decimal("nan"), Fraction(1, 2), Word.TOPK, Number.TWO, Unprintable()),
    *(TwoLines(), Path("x"), ValueError("x"), np.int64(2), np.int32(2), np.float64(0.5)),
    *(np.float32(0.5), np.bool_(True), np.str_("topk"), np.array([1, 2]), np.array(2), np.nan),
    *(torch.tensor(2), torch.tensor([1, 2]), torch.tensor(0.5), torch.float32, torch.device("cpu")),
)


@functools.cache
def values() -> st.SearchStrategy[Any]:
    """Values of any type."""
    simple = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(),
        st.binary(),
        st.complex_numbers(),
    )
    nested = st.recursive(
        simple,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.tuples(inner, inner),
            st.dictionaries(st.text(max_size=5), inner, max_size=3),
        ),
        max_leaves=6,
    )
    return st.one_of(st.sampled_from(ODD), simple, nested)


@functools.cache
def right(hint: Any, wide: bool = True) -> st.SearchStrategy[Any]:
    """Values that an annotation allows; without `wide` small ones, with it also the bounds."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _bounded(hint, wide)
    if origin in (Union, UnionType):
        return st.one_of(*(right(argument, wide) for argument in arguments))
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin is tuple and arguments[-1] is Ellipsis:
        return st.lists(right(arguments[0], wide), max_size=3).map(tuple)
    if origin is tuple:
        return st.tuples(*(right(argument, wide) for argument in arguments))
    if origin is dict and arguments[1] is Any:
        return st.just({})
    if origin is dict:
        return st.dictionaries(st.sampled_from(("tp", "ep")), right(arguments[1], wide))
    plain: dict[Any, st.SearchStrategy[Any]] = {
        int: st.integers(1, 8),
        float: st.floats(0.0, 2.0),
        bool: st.booleans(),
        str: st.sampled_from(("tp-cp-ep-dp-pp", "mixtral-8x7b", "")),
        NoneType: st.none(),
    }
    if hint in plain:
        return plain[hint]
    if is_dataclass(hint):
        return arguments_of(hint).map(lambda given: hint(**given))
    if origin is not None:  # a function
        return st.just(lambda: False)
    return st.none()  # a process group and the like


OPTIONS = tuple(HOME)


def _bounded(hint: Any, wide: bool) -> st.SearchStrategy[Any]:
    base, *extras = get_args(hint)
    for extra in extras:
        if isinstance(extra, Named):
            return st.sampled_from(("topk", "auto", "alltoall", "local", "serial", "loop", "nope"))
        if isinstance(extra, Within) and base is int:
            low = int(extra.least)
            few = st.integers(low, min(low + 16, int(extra.most)))
            return st.one_of(few, st.sampled_from((low, int(extra.most)))) if wide else few
        if isinstance(extra, Within):
            few = st.floats(extra.least, min(extra.most, 4.0))
            return st.one_of(few, st.sampled_from((extra.least, extra.most))) if wide else few
    return right(base, wide)


@st.composite
def arguments_of(draw: Any, owner: type, wide: bool = False) -> dict[str, Any]:
    """Arguments of a settings class of the types that it asks for; some may contradict others.

    All that it requires, and with `wide` up to three others.
    """
    hints = get_type_hints(owner, include_extras=True)
    required = [f.name for f in fields(owner) if f.default is f.default_factory is MISSING]
    others = [field.name for field in fields(owner) if field.name not in required]
    if wide and others:
        required += draw(st.lists(st.sampled_from(others), max_size=3, unique=True))
    return {name: draw(right(hints[name], wide)) for name in required}


@st.composite
def cases(draw: Any, owner: type | None = None) -> Case:
    """A settings class and arguments, of which one or two are of any type."""
    owner = owner or draw(st.sampled_from(SETTINGS))
    try:
        given = draw(arguments_of(owner, wide=draw(st.booleans())))
    except ConfigError:  # of a class that is a field of this one
        given = {}
    names = [field.name for field in fields(owner)]
    for name in draw(st.lists(st.sampled_from(names), min_size=1, max_size=2, unique=True)):
        given[name] = draw(values())
    missing = {
        field.name: draw(values())
        for field in fields(owner)
        if field.name not in given and field.default is MISSING and field.default_factory is MISSING
    }
    return owner, given | missing


def layer_of(**given: Any) -> Any:
    """Make a layer; `given` are arguments of MoELayer."""
    from ep_plugin.moe.config import MoEConfig

    config = MoEConfig(hidden_size=8, ffn_hidden_size=8, num_experts=4)
    return MoELayer(**{"config": config, "groups": ExpertGroups(), **given})


# Functions that take settings, and the names of their arguments.
FUNCTIONS: dict[Callable[..., Any], tuple[str, ...]] = {
    load: ("name",),
    node_size: ("ranks_per_node",),
    resolve: ("name",),
    layer_of: ("config", "groups", "shared_expert", "init_method", "device", "dtype"),
}


@st.composite
def calls(draw: Any) -> Case:
    """A function that takes settings, and an argument of any type."""
    function = draw(st.sampled_from(sorted(FUNCTIONS, key=lambda f: f.__name__)))
    given = {draw(st.sampled_from(FUNCTIONS[function])): draw(values())}
    if function is resolve:
        given["kind"] = draw(st.sampled_from(OPTIONS))
    return function, given


def run(case: Case) -> Any:
    """Return what a case makes, or None where it raises ConfigError, in one line."""
    function, given = case
    try:
        return function(**given)
    except ConfigError as error:
        text = str(error)
    if "\n" in text or len(text) > 2000:
        raise AssertionError(f"no short sentence: {text}")
    return None


def allows(hint: Any, value: Any) -> bool:
    """Whether a value is of a type that an annotation names, outside in; bounds aside."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(allows(argument, value) for argument in arguments)
    if origin is Literal:
        return type(value) is str
    kind = origin or hint
    if kind is float:
        return type(value) in (int, float)
    if kind in (int, bool, str):
        return type(value) is kind
    return kind is Any or isinstance(value, kind)
