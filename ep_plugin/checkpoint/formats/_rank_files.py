"""Are per-rank files those of one save, and are the copies that ranks keep the same?

A folder that was put together by hand, or half copied, has files of another save, or one rank's
file in another's place: of the right size, each whole in itself.
"""

import argparse
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from ep_plugin.checkpoint.run_args import CHECKED
from ep_plugin.errors import ConfigError
from ep_plugin.untrusted import cut, shown

_AGAIN = "copy the checkpoint again, all ranks from one save"
_COUNTERS = ("iteration", "checkpoint_version")
_PLACES = ("tokenizer_model", "heterogeneous_layers_config_path")  # hosts may name them otherwise
_PLAIN = (bool, int, float, str, NoneType, torch.dtype)
# Relative. Ranks sum up the same gradients, but not all kernels do that in the same order.
_DRIFT = 0.01


def check_one_save(files: Mapping[Path, Mapping[str, Any]]) -> None:
    """Raise ConfigError unless all ranks have the same beside their weights.

    `files`: what the file of each holds.
    """
    (first, common), *others = files.items()
    for path, other in others:
        for name, one, its in _values(common, other):
            if not _same(one, its):
                raise ConfigError(
                    f"{_short(path)} has {name} = {shown(its)}, and {_short(first)} has "
                    f"{shown(one)}; {_AGAIN}"
                )
    _check_ranks(
        {path: getattr(common.get("args"), "rank", None) for path, common in files.items()}
    )


def _values(one: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for name in _COUNTERS:
        yield name, one.get(name), other.get(name)
    args, its = one.get("args"), other.get("args")
    if not isinstance(its, argparse.Namespace):
        yield "args", "run arguments", its
        return
    for name in sorted(CHECKED.difference(_PLACES)):
        yield name, getattr(args, name, None), getattr(its, name, None)


def _same(one: Any, other: Any) -> bool:
    """Whether two values are the same, as far as they are plain: others are checked elsewhere."""
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    plain = [type(value) in _PLAIN for value in (one, other)]
    return one == other if all(plain) else not any(plain)


def _check_ranks(ranks: Mapping[Path, Any]) -> None:
    """Raise ConfigError where two files say that the same rank saved them.

    Tools that write the files of all ranks are rank 0 in all of them.
    """
    if all(type(rank) is not int or rank == 0 for rank in ranks.values()):
        return
    seen: dict[int, Path] = {}
    for path, rank in ranks.items():
        if type(rank) is int and seen.setdefault(rank, path) != path:
            raise ConfigError(
                f"{_short(seen[rank])} and {_short(path)} were both saved by rank {shown(rank)}: "
                f"one is a copy of the other; {_AGAIN}"
            )


def check_names(names: Collection[str], path: Path, wanted: Collection[str], first: Path) -> None:
    """Raise ConfigError unless the file of an expert-parallel rank has what the first one has."""
    if odd := sorted({*names} ^ {*wanted}):
        has, lacks = (path, first) if odd[0] in names else (first, path)
        raise ConfigError(
            f"{_short(has)} has {cut(odd[0])}, and {_short(lacks)} does not; {_AGAIN}"
        )


def check_copy(name: str, path: Path, values: Tensor, other: Path, copy: Tensor) -> None:
    """Raise ConfigError unless two ranks hold the same in place of a tensor that is not cut."""
    if (values.shape, values.dtype) != (copy.shape, copy.dtype):
        raise ConfigError(
            f"{cut(name)} is {_kind(values)} in {_short(path)} and {_kind(copy)} in "
            f"{_short(other)}; {_AGAIN}"
        )
    if torch.equal(values, copy):
        return
    apart = (values.double() - copy.double()).norm()
    if not apart <= _DRIFT * values.double().norm():
        raise ConfigError(
            f"{cut(name)} has other values in {_short(other)} than in {_short(path)}, and both "
            f"ranks must hold the same; {_AGAIN}"
        )


def _kind(values: Tensor) -> str:
    return f"{values.dtype} {list(values.shape)}"


def _short(path: Path) -> str:
    return cut(str(Path(*path.parts[-3:])))
