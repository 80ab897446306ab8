"""What a run that goes on has set otherwise than the run that saved: said once, and followed."""

import argparse
from typing import Any

from ep_plugin.megatron.arguments.table import TABLE
from ep_plugin.untrusted import shown

COMPUTED = ("routing", "capacity", "losses", "experts", "fp8")  # groups of what is computed
OF_A_TEACHER = ("teacher", "distill_temperature", "distill_weight", "distill_stop")
HOW_ALONE = ("gemm", "save", "rank_capacity")  # they compute the same, but for rounding
TELLING = tuple(
    row
    for row in TABLE
    if (row.group in COMPUTED and row.name not in HOW_ALONE) or row.name in OF_A_TEACHER
)


def other_settings(args: Any, saved: argparse.Namespace) -> str | None:
    """Return a sentence about them, of a model with experts; None where there are none.

    `saved`: the run arguments in a checkpoint, of any kind. What it does not have, as one of an
    older release, is not compared.
    """
    if args.num_experts is None:
        return None
    found = [
        f"{row.usual_flag} {before}, here {now}"
        for row in TELLING
        if hasattr(saved, row.dest) and hasattr(args, row.dest)
        if (before := shown(getattr(saved, row.dest))) != (now := shown(getattr(args, row.dest)))
    ]
    if not found:
        return None
    return f"this run goes on with other settings than it was saved with: {'; '.join(found)}"
