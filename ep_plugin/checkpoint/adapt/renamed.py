"""The tensors and objects of a checkpoint under other names, and nothing computed."""

import argparse
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from ep_plugin.checkpoint.adapt.upcycle import KEPT
from ep_plugin.checkpoint.tensors import NewObject, NewTensor, Source, one_region

LAYER = re.compile(r"decoder\.layers\.(0|[1-9]\d{0,5})\.(.+)", re.ASCII | re.DOTALL)
OPTIMIZER = re.compile(r"(chained_\d+\.)?optimizer\..+")
# Beside the optimizer's state, what belongs to the run that ends here.
OF_THE_RUN = re.compile(r"rng_state/.+|rerun_state_machine_state/.+")


def renamed(
    source: Source, names: Mapping[str, str], args: argparse.Namespace, beside: Mapping[str, Any]
) -> Source:
    """Return what `names` (old to new) lists of a checkpoint, under its new names.

    `args` are its run arguments now; `beside` is what goes along beside them and the counters of
    the run.
    """
    old = {new: before for before, new in names.items()}
    kept = {key: source.common[key] for key in KEPT if key in source.common}
    metadata = {"content_metadata": source.common.get("content_metadata")}
    return replace(
        source,
        common={**kept, **metadata, **beside, "args": args},
        tensors={new: source.tensors[old[new]] for new in old if old[new] in source.tensors},
        objects=frozenset(new for new in old if old[new] in source.objects),
        read_tensor=lambda name: source.read_tensor(old[name]),
        read_object=lambda name: source.read_object(old[name]),
    )


def content(source: Source) -> tuple[NewTensor | NewObject, ...]:
    """Return all of a checkpoint as content to write. Reads its objects, and no tensor."""
    tensors = [
        NewTensor(name, info, partial(one_region, info, partial(source.read_tensor, name)))
        for name, info in source.tensors.items()
    ]
    return (*tensors, *(NewObject(n, source.read_object(n)) for n in sorted(source.objects)))
