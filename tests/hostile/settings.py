"""Settings classes, made with values of any type."""

import dataclasses
import math
import random
import typing
from collections.abc import Callable
from types import NoneType, UnionType
from typing import Any

from ep_plugin import MoEConfig, ParallelConfig, RoutingConfig
from ep_plugin.checkpoint.adapt.upcycling import GateSums, Losses, Upcycling
from ep_plugin.megatron.edge_settings import EdgeSettings
from tests.hostile import pickles, texts

CLASSES: tuple[Any, ...] = (
    RoutingConfig,
    MoEConfig,
    MoEConfig,
    ParallelConfig,
    EdgeSettings,
    Upcycling,
    GateSums,
    Losses,
)
WORDS = (
    "topk", "expert_choice", "alltoall", "local", "hierarchical", "symm_mem", "auto", "serial",
    "chunked", "loop",
    "tp-cp-ep-dp-pp", "", "nope", "os.system", f"{pickles.MODULE}.build", "..", "_exchange", "a b",
    "x" * 5000,
    "line\nbreak", "<topk>", "<topk=4>", "{flag}", "\0", "[0,1]", "every:2", "[0]*1+[1]*3",
    "[1]*99999999999",
    "__import__('os')", "every:0", "every:-1", "all",
)  # fmt: skip
NUMBERS = (0, 1, 2, 3, 4, 8, 16, 64, -1, 7, 1 << 20, 1 << 40, 1 << 80, True, 0.0, 1.0, 0.5, 1.25,
1e-9, -1.0, 1e308,
           math.nan, math.inf, -math.inf)  # fmt: skip


class Hostile:
    """An object whose methods all fail."""

    def _fail(self, *_: Any) -> Any:
        raise RuntimeError(pickles.MARK)

    __eq__ = __lt__ = __gt__ = __le__ = __ge__ = __bool__ = __len__ = __iter__ = __int__ = (
        __index__
    ) = _fail
    __str__ = __format__ = __float__ = __mod__ = __add__ = __radd__ = _fail
    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return "Hostile()"


OTHERS: tuple[Any, ...] = (
    None, "1", "2", [], {}, (), {1}, b"x", 2 + 3j, object(), lambda: 1, int, "topk", [1, 2],
    {"topk": 2},
    (("sequence", 0.1),), {"tp": 1}, range(3), Hostile(), float, 3.5,
)  # fmt: skip


def wrong(rng: random.Random) -> Any:
    """Return a value of any type."""
    return rng.choice((*OTHERS, *NUMBERS, rng.choice(WORDS), rng.choice(texts.HTML)))


def right(rng: random.Random, hint: Any) -> Any:
    """Return a value of an annotation, large and odd ones among them."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return rng.choice(arguments)
    if origin is typing.Annotated:
        return right(rng, arguments[0])
    if origin in (typing.Union, UnionType):
        return right(rng, rng.choice(arguments))
    if dataclasses.is_dataclass(hint):
        return _made(rng, hint, 0.1, 0.1)
    plain: dict[Any, Callable[[], Any]] = {
        int: lambda: rng.choice([n for n in NUMBERS if type(n) is int]),
        float: lambda: rng.choice(NUMBERS),
        bool: lambda: rng.random() < 0.5,
        str: lambda: rng.choice(WORDS),
        NoneType: lambda: None,
    }
    return plain.get(hint, lambda: wrong(rng))()


def _made(rng: random.Random, cls: Any, odd: float, share: float) -> Any:
    hints = typing.get_type_hints(cls, include_extras=True)
    values: dict[str, Any] = {}
    for one in dataclasses.fields(cls):
        needed = one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING
        if (needed and rng.random() > 0.02) or rng.random() < share:
            values[one.name] = wrong(rng) if rng.random() < odd else right(rng, hints[one.name])
            if needed and rng.random() > odd and hints[one.name] is int:
                values[one.name] = rng.choice((4, 8, 16))
    return cls(**values)


def case(rng: random.Random) -> tuple[str, Callable[[], object]]:
    """Return the name of a class, and what makes one with drawn values."""
    cls, seed = rng.choice(CLASSES), rng.random()
    odd, share = rng.choice((0.0, 0.3, 1.0)), rng.choice((0.05, 0.25, 0.6))

    def make() -> None:
        draws = random.Random(seed)
        try:
            _made(draws, cls, odd, share)
        except TypeError as error:
            if "required" not in str(error):  # a field that is not given is Python's to refuse
                raise

    return f"{cls.__name__} {odd} {share} {seed}", make
