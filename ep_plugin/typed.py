"""Settings are what their annotations say: checked when they are made, `replace` included.

A dataclass that derives from `Typed`, and a function under `typed`, refuse a value that its
annotation does not allow in a ConfigError with the name, the value and what is right. A field has
no entry anywhere for that: its annotation is the rule, and `Annotated[int, Within(1, 8)]` has
bounds. Types are exact: True is no integer and a numpy scalar no number, since what is stored in
checkpoints and compared between ranks has to be plain; but a float of a subclass, as numpy's is,
becomes a plain one. Floats are finite, and take integers.
"""

import functools
import inspect
import math
import re
from collections.abc import Callable, Hashable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import Enum
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from ep_plugin.errors import ConfigError
from ep_plugin.untrusted import shown

LARGEST_INT = 2**31 - 1  # of a field without bounds of its own; sizes and indices are below it
LARGEST_FLOAT = 1e30  # still finite in fp32
LONGEST = 1 << 16  # items of a tuple or dict, characters of a text


@dataclass(frozen=True)
class Within:
    """Bounds of a number, both legal."""

    least: float
    most: float
    rule: str = ""  # what a number must be; "": from the bounds
    use: str = ""  # a value that is legal, or settings in angle brackets; "": the default


@dataclass(frozen=True)
class Named:
    """A text that is an option's name, or a module of the user's own: `my_package.my_router`."""


class _Rule(NamedTuple):
    """What a value must be."""

    fits: Callable[[Any], bool]
    words: str  # behind "must be"
    most: float | None = None  # of a number
    use: str = ""


class Typed:
    """Base of dataclasses whose values are checked by their annotations, before anything else."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = cls.__dict__.get("__post_init__")
        if own is None and hasattr(cls, "__post_init__"):
            return  # its base's, which is checked and looks at all fields

        def checked(self: Any) -> None:
            check_fields(self)
            if own is not None:
                own(self)

        cls.__post_init__ = checked  # type: ignore[attr-defined]


def typed[Function: Callable[..., Any]](function: Function) -> Function:
    """Let a function, or a constructor, check its arguments by their annotations."""
    parameters = inspect.signature(function)

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        rules = _rules_of(function)
        bound = parameters.bind(*args, **kwargs)
        for name, value in bound.arguments.items():
            if name in rules:
                default = parameters.parameters[name].default
                _check(name, value, rules[name], default is inspect.Parameter.empty, default)
                bound.arguments[name] = _plain(value)
        return function(*bound.args, **bound.kwargs)

    return checked  # type: ignore[return-value]


def check_fields(settings: Any) -> None:
    """Raise ConfigError for a field of a dataclass that is not what its annotation says."""
    owner: Any = type(settings)
    rules = _rules_of(owner)
    for field in fields(settings):
        required, value = field.default is MISSING, getattr(settings, field.name)
        _check(field.name, value, rules[field.name], required, field.default)
        if (plain := _plain(value)) is not value:
            object.__setattr__(settings, field.name, plain)


def check_value(owner: type, name: str, value: Any) -> None:
    """Raise ConfigError unless `value` may be the field `name` of the dataclass `owner`."""
    rules = _rules_of(owner)
    if name not in rules:
        raise ConfigError(f"{shown(name)} is no setting; use one of {', '.join(rules)}")
    default = next(field.default for field in fields(owner) if field.name == name)
    _check(name, value, rules[name], default is MISSING, default)


def _plain(value: Any) -> Any:
    """Return a value that fits with plain floats for those of subclasses; it, where none is."""
    if isinstance(value, float) and type(value) is not float:
        return float(value)
    if type(value) is tuple:
        made = tuple(map(_plain, value))
        return made if any(new is not old for new, old in zip(made, value, strict=True)) else value
    return value


def _check(name: str, value: Any, rule: _Rule, required: bool, default: Any) -> None:
    if rule.fits(value):
        return
    words, most = rule.words, rule.most
    if type(value) in (int, float) and most is not None and 1 < most < value < math.inf:
        words = f"at most {most:.10g}"
    use = rule.use or ("" if required else _spelled(default))
    use = _scalar(value, rule) or use
    settings = use if "<" in use or not use else f"<{name}={use}>"
    if use.endswith("(...)"):
        settings = f"<{name}>={use}"
    if type(value) is list and rule.fits(tuple(value)):
        text = shown(value)
        words, use = "a tuple", "tuple"
        settings = f"<{name}>=tuple({text if '...' not in text else '...'})"
    raise ConfigError(
        f"<{name}> must be {words}; got {shown(value)}" + (f"; use {settings}" if use else "")
    )


def _spelled(default: Any) -> str:
    return str(default) if type(default) in (NoneType, bool, int, float, str) else ""


def _scalar(value: Any, rule: _Rule) -> str:
    """Return the plain value in an enum's member, a scalar of numpy or torch or a whole float."""
    try:
        if isinstance(value, float):
            plain: Any = int(value) if value.is_integer() else value
        else:
            plain = value.value if isinstance(value, Enum) else value.item()
        return _spelled(plain) if rule.fits(plain) else ""
    except Exception:  # `item` is any object's
        return ""


@functools.cache
def _rules_of(owner: Hashable) -> dict[str, _Rule]:
    """Return the rule of each annotated name of a class or a function."""
    hints = get_type_hints(owner, include_extras=True)
    if isinstance(owner, type):
        hints = {field.name: hints[field.name] for field in fields(owner)}
    return {name: _rule(hint) for name, hint in hints.items() if name != "return"}


def _rule(hint: Any) -> _Rule:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _bounded(*arguments)
    if origin in (Union, UnionType):
        rules = [_rule(argument) for argument in arguments]
        first = next((rule for rule in rules if rule.most is not None or rule.use), rules[0])
        words = " or ".join(rule.words for rule in rules if rule is not _SIMPLE[NoneType])
        return first._replace(fits=lambda v: any(rule.fits(v) for rule in rules), words=words)
    if origin is Literal:
        return _Rule(lambda v: type(v) is str and v in arguments, f"one of {', '.join(arguments)}")
    if origin is tuple:
        return _tuple(arguments)
    if origin is dict:
        return _dict(*(_rule(argument) for argument in arguments))
    if hint is Any:
        return _Rule(lambda v: True, "anything")
    if hint in _SIMPLE:
        return _SIMPLE[hint]
    if origin is not None and isinstance(origin, type) and issubclass(origin, Callable):  # type: ignore[arg-type]
        return _Rule(callable, "a function")
    if not isinstance(hint, type):
        raise TypeError(f"settings cannot be checked against {hint}")
    use = f"{hint.__name__}(...)" if is_dataclass(hint) else ""
    words = f"{_article(hint.__name__)} {hint.__name__}"
    return _Rule(lambda v: isinstance(v, hint), words, use=use)


def _article(word: str) -> str:
    return "an" if word[0] in "AEIOU" else "a"


def _is_int(value: Any) -> bool:
    return type(value) is int and abs(value) <= LARGEST_INT


def _is_float(value: Any) -> bool:
    right = type(value) is int or (isinstance(value, float) and not isinstance(value, Enum))
    return right and abs(value) <= LARGEST_FLOAT


def _is_text(value: Any) -> bool:
    return type(value) is str and len(value) <= LONGEST and value.isprintable()


_SIMPLE = {
    int: _Rule(_is_int, "an integer", most=LARGEST_INT),
    float: _Rule(_is_float, "a finite number", most=LARGEST_FLOAT),
    bool: _Rule(lambda v: type(v) is bool, "True or False"),
    str: _Rule(_is_text, "a text of one line"),
    NoneType: _Rule(lambda v: v is None, "None"),
}
NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)


def _bounded(base: Any, *extras: Any) -> _Rule:
    """Return the rule of an annotated type; what is not ours among `extras` says nothing."""
    rule = _rule(base)
    for extra in extras:
        if isinstance(extra, Within):
            rule = _within(base, rule, extra)
        elif isinstance(extra, Named):
            rule = _Rule(
                lambda v, fits=rule.fits: fits(v) and NAME.fullmatch(v) is not None,  # type: ignore[misc]
                "the name of an option, or a module of your own such as my_package.my_option",
            )
    return rule


def _within(base: Any, rule: _Rule, bounds: Within) -> _Rule:
    kind = "an integer" if base is int else "a number"
    return _Rule(
        lambda v: rule.fits(v) and bounds.least <= v <= bounds.most,
        bounds.rule or f"{kind} of at least {bounds.least}",
        bounds.most,
        bounds.use,
    )


def _tuple(arguments: tuple[Any, ...]) -> _Rule:
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        item = _rule(arguments[0])
        return _Rule(
            lambda v: type(v) is tuple and len(v) <= LONGEST and all(map(item.fits, v)),
            f"a tuple, each of it {item.words}",
        )
    items = [_rule(argument) for argument in arguments]
    return _Rule(
        lambda v: (
            type(v) is tuple
            and len(v) == len(items)
            and all(rule.fits(part) for rule, part in zip(items, v, strict=True))
        ),
        f"a tuple of {' and '.join(rule.words for rule in items)}",
    )


def _dict(key: _Rule, value: _Rule) -> _Rule:
    return _Rule(
        lambda v: (
            type(v) is dict
            and len(v) <= LONGEST
            and all(key.fits(k) and value.fits(x) for k, x in v.items())
        ),
        f"a dict of {key.words} to {value.words}",
    )
