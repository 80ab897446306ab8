"""What Megatron's parser with our flags makes of each command line in a file, as JSON.

python parse_lines.py LINES.json ANSWERS.json
"""

import contextlib
import functools
import inspect
import io
import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import ep_plugin.megatron

KEPT = ("ep_", "moe_", "num_experts", "expert_", "overlap_", "fp8", "ckpt_", "dist_ckpt")
CONFIG = ("activation_func", "gated_linear_unit", "num_moe_experts", "add_bias_linear")


def parse(line: list[str]) -> dict[str, str]:
    """Return what the run's arguments are after all checks, or what was refused and how."""
    arguments: Any = import_module("megatron.training.arguments")
    building: Any = import_module("megatron.training.argument_utils")
    sys.argv = ["pretrain", *line]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            args = arguments.parse_args()
            arguments.validate_args(args)
            config = building.core_transformer_config_from_args(args)
    except SystemExit as error:
        lines = said.getvalue().strip().splitlines() or [""]
        return {"exit code": str(error.code), "refused": lines[-1]}
    except Exception as error:
        return {"exit code": "1", "refused": f"{type(error).__name__}: {error}"}
    found = {k: show(v) for k, v in vars(args).items() if k.startswith(KEPT)}
    seen = {k: show(v) for k, v in vars(config).items() if k in CONFIG or k.startswith("moe_")}
    return {**found, **{f"config.{name}": value for name, value in seen.items()}}


def show(value: Any) -> str:
    """Return a text without addresses."""
    return (
        f"{value.__module__}.{value.__qualname__}"
        if hasattr(value, "__qualname__")
        else repr(value)
    )


def flags() -> list[str]:
    """Return every --ep-* flag that the parser has."""
    arguments: Any = import_module("megatron.training.arguments")
    parser = arguments.add_megatron_arguments(import_module("argparse").ArgumentParser())
    return sorted(name for name in parser._option_string_actions if name.startswith("--ep-"))


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    ep_plugin.megatron.install()
    inspect.getsource = functools.cache(inspect.getsource)  # Megatron reads its own for each help
    answers = [parse(line) for line in json.loads(source.read_text())]
    target.write_text(json.dumps({"flags": flags(), "answers": answers}))
