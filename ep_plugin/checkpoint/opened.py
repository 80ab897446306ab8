"""A model that was opened, and what was made of it: experts, a student, the other class.

Nothing of it is computed yet. `open.py` opens one, and what lies in `adapt` makes others of it.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ep_plugin.checkpoint.family import Family
from ep_plugin.checkpoint.tensors import NewObject, NewTensor, Source

Spelling = Literal["stored", "plain"]
ModelClass = Literal["gpt", "hybrid"]
Origins = dict[str, tuple[str, ...]]  # name -> names in the folder that it is made of


@dataclass(frozen=True)
class Upcycled:
    """The new checkpoint, not computed yet."""

    content: tuple[NewTensor | NewObject, ...]
    common: dict[str, Any]
    name_map: tuple[tuple[str, str], ...]  # (dense name, new name); "" where there is none
    dropped: int
    moe_layers: tuple[bool, ...]
    deviations: tuple[str, ...] = ()  # why the function is not kept; empty: it is
    optimizer: bool = False  # whether optimizer state goes along

    @property
    def num_bytes(self) -> int:
        return sum(entry.info.num_bytes for entry in self.content if isinstance(entry, NewTensor))


@dataclass(frozen=True)
class Kept:
    """Which layers were kept, and under which names their tensors are now."""

    layers: tuple[int, ...]  # of the teacher, in the student's order
    of: int  # how many the teacher has
    content: tuple[NewTensor | NewObject, ...]  # empty where names are spelled anew
    name_map: tuple[tuple[str, str], ...]  # (the teacher's name, the student's)
    dropped: int


@dataclass(frozen=True)
class Reclassed:
    """A model of the other class."""

    to: ModelClass
    pattern: str  # of the HybridModel
    content: tuple[NewTensor | NewObject, ...]
    name_map: tuple[tuple[str, str], ...]  # (name before, name now)
    dropped: int
    optimizer: bool  # whether its state goes along


@dataclass(frozen=True)
class Opened:
    """A model: its tensors under names of one spelling, its arguments, and where it comes from."""

    folder: Path  # that was read: of the iteration, or the Hugging Face model
    source: Source
    args: argparse.Namespace
    spelling: Spelling
    origins: Origins
    family: Family | None = None  # of a Hugging Face model
    left_out: tuple[str, ...] = ()
    emptied: tuple[str, ...] = ()  # objects that are written without what they held
    deviations: tuple[str, ...] = ()  # why the function is not kept; empty: it is
    upcycled: Upcycled | None = None  # what gave it its experts
    kept: Kept | None = None  # of a student: the teacher's layers that it has
    reclassed: Reclassed | None = None  # of a model that was of the other class
    cut_rows: int = 0  # of the vocabulary, which only padded it
