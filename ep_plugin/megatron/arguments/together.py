"""Flags of ours and of Megatron that set the same thing. Imports neither torch nor Megatron."""

from collections.abc import Collection, Iterable, Iterator
from typing import Any

from ep_plugin.errors import ConfigError
from ep_plugin.megatron.arguments.table import TABLE, Argument
from ep_plugin.megatron.arguments.theirs import one
from ep_plugin.moe.rules import said

OF_DENSE_BLOCKS = ("fp8",)  # Megatron's is for dense blocks, ours for experts: they may differ


def check_together(args: Any, typed: Collection[str]) -> None:
    """Raise ConfigError if two flags in `typed` contradict each other."""
    if args.num_experts is None:
        return
    for row in TABLE:
        if row.cousin in typed and row.flag in typed and row.name not in OF_DENSE_BLOCKS:
            _check_cousins(row, args)
    coefficient, balancing = one(args.moe_aux_loss_coeff), args.moe_router_load_balancing_type
    named = [flag for flag in ("--moe-aux-loss-coeff", "--ep-aux-loss-coeff") if flag in typed]
    by_type = "--moe-router-load-balancing-type"
    if named and coefficient and one(balancing) == "none" and by_type in typed:
        raise ConfigError(
            f"{named[0]} ({coefficient}) is the coefficient of a loss, and {by_type} (none) has "
            "none; leave one of them out"
        )


def _check_cousins(row: Argument, args: Any) -> None:
    assert row.cousin is not None
    ours = getattr(args, row.dest)
    theirs = one(getattr(args, row.cousin.removeprefix("--").replace("-", "_")))
    if ours is False:
        on = row.cousin_values["True"]
        clash = theirs == (on or True)
    else:
        clash = row.cousin_values.get(str(ours), ours) not in ("", theirs)
    if clash:
        bare = theirs is True
        raise ConfigError(
            f"{row.flag} ({said(ours)}) and {row.cousin}{'' if bare else f' ({theirs})'} "
            "contradict each other; leave one of them out"
        )


def unless_typed(preset: list[str], typed: Collection[str]) -> list[str]:
    """Return the arguments of `preset` without flags that `typed` sets as well.

    A typed flag replaces the preset's value, whether it is typed by our name or by Megatron's.
    """
    names = {name: row for row in TABLE for name in (row.flag, row.cousin) if name is not None}
    kept: list[str] = []
    for flag, *values in _flags(preset):
        row = names.get(flag)
        if row is None or row.cousin is None or not {row.flag, row.cousin} & set(typed):
            kept += [flag, *values]
    return kept


def _flags(words: Iterable[str]) -> Iterator[list[str]]:
    """Yield each flag of a command line as a list: the flag, then its values."""
    found: list[str] = []
    for word in words:
        if word.startswith("--") and found:
            yield found
            found = []
        found.append(word)
    if found:
        yield found
