"""Whether layouts can divide a model and resume one another, before minutes of runs."""

from collections.abc import Sequence
from itertools import pairwise

from ep_plugin.commands.parity.comparable import is_number, value
from ep_plugin.commands.parity.layouts import ONE_RANK, Layout, parse, spell
from ep_plugin.errors import ConfigError, largest_divisor

DIVIDED = {  # degree -> flags whose sizes it must divide
    "tp": ("--num-attention-heads", "--hidden-size", "--ffn-hidden-size"),
    "etp": ("--moe-ffn-hidden-size",),
    "ep": ("--num-experts",),
    "pp": ("--num-layers",),
}


def check_sizes(arguments: list[str], layouts: Sequence[Layout]) -> None:
    """Raise ConfigError, with a layout that goes, for one that does not divide the model."""
    for layout in layouts:
        for degree, flags in DIVIDED.items():
            size = _degree(layout, degree)
            for flag in flags:
                text = value(arguments, flag)
                if text is not None and is_number(text) and int(text) % size:
                    raise ConfigError(
                        f"--layouts {layout.name}: {degree} ({size}) must divide {flag} ({text}); "
                        f"use --layouts {that_goes(arguments, layout)}"
                    )
        if layout.parallel.ep > 1 and value(arguments, "--num-experts") is None:
            raise ConfigError(
                f"--layouts {layout.name} spreads experts, and ARGS have none; use --num-experts "
                f"{2 * layout.parallel.ep} before --layouts"
            )


def check_resumes(arguments: list[str], layouts: Sequence[Layout]) -> None:
    """Raise ConfigError where a layout cannot resume what the one before it saved.

    Without the distributed optimizer Megatron has a second one for experts that are averaged over
    other ranks than the rest, and loads the state of as many as there are.
    """
    one = value(arguments, "--optimizer") in (None, "adam", "sgd")  # others are several by nature
    if not one or "--use-distributed-optimizer" in arguments:
        return
    if value(arguments, "--num-experts") is None:
        return
    for before, layout in pairwise([ONE_RANK, *layouts]):
        if _experts_apart(before) != _experts_apart(layout):
            raise ConfigError(
                f"--resume: {layout.name} cannot resume the optimizer's state of {before.name}, "
                "which Megatron keeps otherwise without the distributed optimizer; use "
                "--use-distributed-optimizer before --resume"
            )


def _experts_apart(layout: Layout) -> bool:
    return layout.parallel.ep > 1 or layout.parallel.expert_tp != layout.parallel.tp


def that_goes(arguments: list[str], layout: Layout) -> str:
    """Return the layout with each degree made as much smaller as the sizes ask for."""
    sizes = {}
    for degree in ("tp", "pp", "cp", "ep", "etp"):
        size = _degree(layout, degree)
        for flag in DIVIDED.get(degree, ()) * 2:  # one size can undo what another asked for
            text = value(arguments, flag)
            if text is not None and is_number(text) and int(text) > 0:
                size = largest_divisor(int(text), size)
        if size > 1 or degree == "ep":
            sizes[degree] = size
    return _with_etp(sizes)


def _with_etp(sizes: dict[str, int]) -> str:
    """Write etp, where it is not tp."""
    etp, tp = sizes.pop("etp", 1), sizes.get("tp", 1)
    found = spell(sizes if etp == tp else {**sizes, "etp": etp})
    parse(found)
    return found


def _degree(layout: Layout, name: str) -> int:
    parallel = layout.parallel
    return parallel.expert_tp if name == "etp" else int(getattr(parallel, name))
