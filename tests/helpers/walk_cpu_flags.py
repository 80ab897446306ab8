"""What CPU mode does with each flag of this release that needs a GPU, and which others sound so.

Prints JSON: "alone" has for each command line what was said, or how it ended; "sounds" the names
of arguments that speak of GPUs and have no row.
"""

import argparse
import contextlib
import io
import json
import re
from typing import Any

import cpu_only  # noqa: F401  before Megatron
from loop import MODEL

from ep_plugin.megatron.arguments.theirs import BY_FIELD
from ep_plugin.megatron.cpu.arguments import GIVEN, LEFT_OUT, RECOMPUTED_BY_ENGINE, REFUSED
from ep_plugin.megatron.seams.install import install

SOUNDS = re.compile(
    r"transformer.?engine|\bTE\b|cuda|gpu|nccl|apex|flash|deepep|sharp|kitchen|fused|fusion|nvtx"
    r"|fsdp|hybridep|userbuf|tp-comm|cutlass|triton|cudnn|\bSMs?\b|device memory",
    re.IGNORECASE,
)
ROWS = {*GIVEN, *REFUSED, *(name for names in LEFT_OUT.values() for name in names.split())}
MORE = (
    "--attention-backend flash",
    "--attention-backend fused",
    "--profile",
    *(
        f"--recompute-granularity selective --recompute-modules {module}"
        for module in (*RECOMPUTED_BY_ENGINE, f"core_attn {RECOMPUTED_BY_ENGINE[0]}")
    ),
)
VALUES = {"position_embedding_type": "relative", "non_persistent_ckpt_type": "local"}


def typed(action: argparse.Action) -> str | None:
    """Return the flag with a value that is not its default; None for a switch that is on."""
    flag = action.option_strings[0]
    if action.nargs == 0:
        return flag if action.const is not False else None
    others = [c for c in action.choices or () if c != action.default]
    value = VALUES.get(action.dest, others[0] if others else 2 if action.type is int else "x")
    return f"{flag} {value}"


def said(parser: argparse.ArgumentParser, flags: str) -> dict[str, Any]:
    """Validate a command line as a run does, up to the configuration of its model."""
    from megatron.training import arguments

    out, err = io.StringIO(), io.StringIO()
    words = [*MODEL, "--train-iters", "1", *flags.split()]
    error = ""
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            args = parser.parse_args(words)
            args.rank, args.world_size = 0, 2
            arguments.validate_args(args)
            arguments.core_transformer_config_from_args(args)
        except SystemExit:
            error = err.getvalue().strip().splitlines()[-1]
        except Exception as mistake:
            error = f"{type(mistake).__name__}: {mistake}"
    line = [line for line in out.getvalue().splitlines() if "CPU mode (gloo, no" in line]
    return {"line": line[0] if line else "", "error": error}


def main() -> None:
    """Walk over this release."""
    install()
    from megatron.training import arguments

    parser = arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    actions = [action for action in parser._actions if action.option_strings]
    alone = (typed(a) for a in actions if a.dest in ROWS)
    lines = [*filter(None, alone), *MORE]
    sounds = [
        action.dest
        for action in actions
        if SOUNDS.search(f"{action.option_strings} {action.help}") and action.dest not in ROWS
        if action.dest not in BY_FIELD and not action.dest.startswith("ep_")
    ]
    print(json.dumps({"alone": {flags: said(parser, flags) for flags in lines}, "sounds": sounds}))


if __name__ == "__main__":
    main()
